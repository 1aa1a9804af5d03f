#!/usr/bin/env bash
# Puts a backup in the place of PostgreSQL's data and of the workspace, whatever is there, and starts the stack.
#
#   docker/restore.sh BACKUP    # a folder that docker/backup.sh has made; `make restore BACKUP=…` calls it
set -euo pipefail
backup=$(realpath "${1:?the backup: one of the folders that make backup has made}")
cd "$(dirname "$0")/.."
for file in airflow.dump mlflow.dump workspace.tar; do
    [ -f "$backup/$file" ] || { echo "$backup holds no $file: name a folder that make backup has made" >&2 && exit 2; }
done
stack=$(docker compose config | sed -n 's/^name: //p')

# What cannot be read is refused before anything is taken away.
for database in airflow mlflow; do
    docker compose run --rm -T --no-deps --entrypoint pg_restore postgres --file=/dev/null <"$backup/$database.dump" ||
        { echo "$backup/$database.dump is no whole dump: name another backup" >&2 && exit 2; }
done
tar --list --file="$backup/workspace.tar" >/dev/null ||
    { echo "$backup/workspace.tar is no whole archive: name another backup" >&2 && exit 2; }

docker compose down
docker/end_steps.sh
docker volume rm --force "${stack}_postgres" >/dev/null
docker compose up --detach --wait --no-build postgres
for database in airflow mlflow; do
    docker compose exec -T postgres psql --username=postgres --quiet --set=ON_ERROR_STOP=1 \
        --command="CREATE ROLE $database LOGIN" --command="CREATE DATABASE $database OWNER $database"
    docker compose exec -T postgres pg_restore --username=postgres --exit-on-error --dbname="$database" \
        <"$backup/$database.dump"
done
in_workspace() { docker run --rm --interactive --network none --volume "$stack-workspace:/workspace" --entrypoint "$@"; }
in_workspace find "$stack-trainer" /workspace -mindepth 1 -delete
in_workspace tar "$stack-trainer" --extract --directory=/workspace <"$backup/workspace.tar"
docker compose up --detach --wait --no-build
