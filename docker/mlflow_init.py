"""MLflow's tables, and its users with the passwords of the secrets: before every start of the server.

`admin` may do everything; `steps`, by which the steps and the DAGs come, owns the registered models and what else it
makes; `reviewer` and whoever else gets an account may look (`default_permission`). These are MLflow's own rights, and
wide; mlflow_app.py says what of them each may use, and lets the reviewer approve.

    python docker/mlflow_init.py FILE    # FILE becomes the server's configuration of users (MLFLOW_AUTH_CONFIG_PATH)
"""

import configparser
import os
import sys
from pathlib import Path

from mlflow.db import upgrade
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyRegistry

from tasks import config

USERS = {  # and the secret that holds the password
    "admin": "MLFLOW_AUTH_ADMIN_PASSWORD",
    "steps": "MLFLOW_TRACKING_PASSWORD",
    "reviewer": "MLFLOW_REVIEWER_PASSWORD",
}


def main(configuration: Path) -> None:
    database = os.environ["MLFLOW_BACKEND_STORE_URI"]
    upgrade.callback(database)  # the server refuses the tables of an older release
    write_configuration(configuration, database)
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore  # it reads the file when it is imported

    store = SqlAlchemyStore()
    store.init_db(database)
    for user, secret in USERS.items():
        password = os.environ[secret]
        if not store.has_user(user):
            store.create_user(user, password, is_admin=user == "admin")
        elif not store.authenticate_user(user, password):
            store.update_user(user, password=password)
    model = config.load().mlflow.registered_model
    for name in (model, f"{model}-lease"):
        create_model(database, name)
        store.grant_user_permission("steps", "registered_model", name, "MANAGE")
    store.grant_user_permission("reviewer", "registered_model", model, "READ")  # an earlier release gave EDIT


def write_configuration(file: Path, database: str) -> None:
    """The server's configuration of its users.

    Without the cache the server hashes the password several times a request, half a second of a core in all.
    """
    settings = configparser.ConfigParser(interpolation=None)
    settings["mlflow"] = {
        "default_permission": "READ",
        "admin_username": "admin",
        "database_uri": database.replace("%", "%%"),  # the server reads it with interpolation
        "auth_cache_ttl_seconds": "60",
    }
    with file.open("w", encoding="utf-8") as opened:
        file.chmod(0o600)
        settings.write(opened)


def create_model(database: str, name: str) -> None:
    """An empty registered model: to all but admins, MLflow refuses questions about one that is not there yet."""
    registry = SqlAlchemyRegistry(database)
    try:
        registry.get_registered_model(name)
    except MlflowException:
        registry.create_registered_model(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
