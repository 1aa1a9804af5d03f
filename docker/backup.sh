#!/usr/bin/env bash
# PostgreSQL's databases and the workspace, as they are between two steps, into a new folder. `make backup` calls it.
#
#   docker/backup.sh FOLDER
#
# secrets/ is not in it: keep a copy elsewhere, the databases hold what its Fernet key has encrypted.
set -euo pipefail
umask 077 # it holds people's messages, and hashes of passwords
mkdir -p "${1:?the folder of the backups}"
folder=$(realpath "$1")/$(date --utc +%Y-%m-%dT%H-%M-%S)
cd "$(dirname "$0")/.."
volume=$(docker compose config | sed -n 's/^name: //p')-workspace

require_no_step() {
    local steps
    steps=$(docker ps --all --filter "label=toxic.workspace=$volume" --format '{{.Label "toxic.step"}}')
    [ -z "$steps" ] && return
    echo "a step is running ($steps): back up when its run is over, or mark the run failed in Airflow first" >&2
    exit 1
}

# A task that was killed may have left its container, running or not. Nobody waits for it; nor for any, where the scheduler
# does not run.
if [ -n "$(docker compose ps --quiet --status=running airflow-scheduler)" ]; then
    docker compose exec -T airflow-scheduler python -m dags.orphans
else
    docker/end_steps.sh
fi
require_no_step
docker compose stop airflow-scheduler # so that none starts meanwhile; what serves goes on
trap 'docker compose start airflow-scheduler' EXIT
require_no_step # one may have started while it stopped
mkdir "$folder.part"
for database in airflow mlflow; do
    docker compose exec -T postgres pg_dump --username=postgres --format=custom "$database" >"$folder.part/$database.dump"
done
docker run --rm --network none --volume "$volume:/workspace:ro" --entrypoint tar toxic-trainer \
    --create --directory=/workspace . >"$folder.part/workspace.tar"
mv "$folder.part" "$folder"
echo "$folder"
