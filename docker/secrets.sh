#!/usr/bin/env bash
# Makes the secrets of the stack that are not there yet, a file each; what is there stays. `make secrets` calls it.
#
#   docker/secrets.sh FOLDER             # make what is missing
#   docker/secrets.sh FOLDER NAME …      # make these anew: docker compose takes them up at the next start
set -euo pipefail
folder=${1:?the folder of the secrets}
shift
case $folder in
*[\$\#\\\"\'\`]* | *$'\n'*)
    echo "the folder of the secrets, $folder, has a character in its path that .env can't hold (\$ # \\, a quote, a line" \
        "break): name another one in TOXIC_SECRETS" >&2
    exit 2
    ;;
esac
umask 077
mkdir -p "$folder"
chmod 700 "$folder"

random() { head -c "$1" /dev/urandom | base64 --wrap=0 | tr '+/' '-_' | tr -d '='; }

value() {
    case $1 in
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN) echo "postgresql+psycopg2://airflow:$(random 24)@postgres/airflow" ;;
    MLFLOW_BACKEND_STORE_URI) echo "postgresql+psycopg2://mlflow:$(random 24)@postgres/mlflow" ;;
    AIRFLOW__CORE__FERNET_KEY) echo "$(random 32)=" ;; # 32 bytes in base64
    TOXIC_SIGNING_KEY) random 32 ;;                  # tasks/promotion/signatures.py
    AIRFLOW__API__SECRET_KEY | AIRFLOW__API_AUTH__JWT_SECRET | MLFLOW_FLASK_SERVER_SECRET_KEY) random 64 ;;
    POSTGRES_PASSWORD | MLFLOW_TRACKING_PASSWORD) random 24 ;;
    AIRFLOW_*_PASSWORD | MLFLOW_*_PASSWORD) random 15 ;; # what people type
    KAGGLE_API_TOKEN | HF_TOKEN) ;;                    # yours; empty: none
    *) echo "$1 is not a secret of the stack: see $0" >&2 && return 2 ;;
    esac
}

all=(
    POSTGRES_PASSWORD AIRFLOW__DATABASE__SQL_ALCHEMY_CONN MLFLOW_BACKEND_STORE_URI
    AIRFLOW__CORE__FERNET_KEY AIRFLOW__API__SECRET_KEY AIRFLOW__API_AUTH__JWT_SECRET MLFLOW_FLASK_SERVER_SECRET_KEY
    AIRFLOW_ADMIN_PASSWORD AIRFLOW_OPERATOR_PASSWORD AIRFLOW_REVIEWER_PASSWORD AIRFLOW_VIEWER_PASSWORD
    MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_REVIEWER_PASSWORD MLFLOW_TRACKING_PASSWORD
    TOXIC_SIGNING_KEY KAGGLE_API_TOKEN HF_TOKEN
)
for name in "${@:-${all[@]}}"; do
    [ $# -gt 0 ] || [ ! -e "$folder/$name" ] || continue
    made=$(value "$name")
    printf '%s' "$made" >"$folder/.$name"
    # The folder keeps others on this host out; in a container another user reads the file, which is mounted by itself.
    chmod 644 "$folder/.$name"
    mv "$folder/.$name" "$folder/$name"
    echo "made $folder/$name"
done
