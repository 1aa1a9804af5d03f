"""What has to be there before Airflow and MLflow start: databases, tables, the GPU's pool, roles and users.

It runs at every start of the stack and changes only what is not as it should be, so a new password in the secrets holds
from the next start on.
"""

import json
import os
import subprocess

from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder
from airflow.providers.fab.auth_manager.security_manager.override import FabAirflowSecurityManagerOverride
from sqlalchemy.engine import make_url

LOOK = FabAirflowSecurityManagerOverride.VIEWER_PERMISSIONS
WEEKLY, RELEASE = "DAG:toxicity_weekly", "DAG:toxicity_release"
# What a role may do beyond looking. To answer a review, Airflow wants `can_edit` on the DAG too, which also pauses it.
ROLES = {
    "Operator": [
        ("can_edit", WEEKLY),
        ("can_create", "DAG Run:toxicity_weekly"),
        ("can_edit", "DAG Runs"),  # only of the DAGs above: clear, mark, note
        ("can_edit", "Task Instances"),
    ],
    "Reviewer": [
        ("can_edit", WEEKLY),
        ("can_edit", "HITL Detail"),
        ("menu_access", "HITL Detail"),
        ("can_edit", RELEASE),
        ("can_create", "DAG Run:toxicity_release"),
    ],
}
USERS = {  # their role, and the secret that holds their password
    "admin": ("Admin", "AIRFLOW_ADMIN_PASSWORD"),
    "operator": ("Operator", "AIRFLOW_OPERATOR_PASSWORD"),
    "reviewer": ("Reviewer", "AIRFLOW_REVIEWER_PASSWORD"),
    "viewer": ("Viewer", "AIRFLOW_VIEWER_PASSWORD"),
}


def main() -> None:
    create_databases()
    subprocess.run(["airflow", "db", "migrate"], check=True)
    create_pool()
    with get_application_builder() as appbuilder:
        create_users(appbuilder.sm)


def create_databases() -> None:
    """A database and its owner for each address of the secrets, with the password that stands there."""
    import psycopg2
    from psycopg2 import sql

    addresses = [
        make_url(os.environ[name]) for name in ("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "MLFLOW_BACKEND_STORE_URI")
    ]
    server = psycopg2.connect(
        host=addresses[0].host, user="postgres", password=os.environ["POSTGRES_PASSWORD"], dbname="postgres"
    )
    server.autocommit = True  # CREATE DATABASE stands alone
    with server.cursor() as cursor:
        for address in addresses:
            user, database = sql.Identifier(address.username), sql.Identifier(address.database)
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [address.username])
            if not cursor.fetchone():
                cursor.execute(sql.SQL("CREATE ROLE {} LOGIN").format(user))
            cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD %s").format(user), [address.password])
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [address.database])
            if not cursor.fetchone():
                cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, user))
            # Each time: a restore makes the databases itself.
            cursor.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(database))
    server.close()


def create_pool() -> None:
    """One slot per GPU (dags/steps.py); on a host without any, one heavy step at a time."""
    slots = len([gpu for gpu in os.environ.get("TOXIC_GPUS", "").split(",") if gpu]) or 1
    subprocess.run(["airflow", "pools", "set", "gpu", str(slots), "one slot per GPU"], check=True)


def create_users(security) -> None:
    security.sync_roles()
    security.bulk_sync_roles([{"role": role, "perms": [*LOOK, *more]} for role, more in ROLES.items()])
    for name, more in ROLES.items():  # the call above only adds; an earlier release may have given more
        role = security.find_role(name)
        for permission in list(role.permissions):
            if (permission.action.name, permission.resource.name) not in {*LOOK, *more}:
                security.remove_permission_from_role(role, permission)
    for name, (role, secret) in USERS.items():
        user, password = security.find_user(name), os.environ[secret]
        if user is None:
            security.add_user(name, name.title(), "", f"{name}@localhost", security.find_role(role), password)
        elif not security.check_password(name, password):
            security.reset_password(user.id, password)
    print(json.dumps({"users": sorted(USERS)}))


if __name__ == "__main__":
    main()
