"""MLflow's users, with the passwords of the secrets: before every start of the server, so that a new secret holds.

`admin` may do everything; `steps`, by which the steps and the DAGs come, owns what it has made; `reviewer` may set the
model's aliases and tags; whoever else gets an account may look (`default_permission`).

    python docker/mlflow_init.py FILE    # FILE becomes the server's configuration of users (MLFLOW_AUTH_CONFIG_PATH)
"""

import os
import sys
from pathlib import Path

from tasks import config

USERS = {  # and the secret that holds the password
    "admin": "MLFLOW_AUTH_ADMIN_PASSWORD",
    "steps": "MLFLOW_TRACKING_PASSWORD",
    "reviewer": "MLFLOW_REVIEWER_PASSWORD",
}


def main(configuration: Path) -> None:
    database = os.environ["MLFLOW_BACKEND_STORE_URI"]
    escaped = database.replace("%", "%%")  # the file is read with interpolation
    configuration.write_text(
        f"[mlflow]\ndefault_permission = READ\nadmin_username = admin\ndatabase_uri = {escaped}\n", encoding="utf-8"
    )
    configuration.chmod(0o600)
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
    store.grant_user_permission("reviewer", "registered_model", model, "EDIT")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
