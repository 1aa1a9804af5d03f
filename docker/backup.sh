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
stack=$(docker compose config | sed -n 's/^name: //p')
volume=$stack-workspace

refuse() {
    echo "$1: back up when its run is over, or mark the run failed in Airflow first" >&2
    exit 1
}

require_no_step() {
    local steps
    steps=$(docker ps --all --filter "label=toxic.workspace=$volume" --format '{{.Label "toxic.step"}}')
    [ -z "$steps" ] || refuse "a step is running ($steps)"
}

# Between two steps of a run the next one is about to start. A run that waits, for a reviewer or for the next try of a
# task, goes on from there.
require_no_run() {
    local runs
    runs=$(docker compose exec -T postgres psql --username=postgres --dbname=airflow --tuples-only --no-align --command="
        SELECT dag_id || ' ' || run_id FROM dag_run WHERE state = 'running' AND NOT EXISTS (
            SELECT FROM task_instance task WHERE (task.dag_id, task.run_id) = (dag_run.dag_id, dag_run.run_id)
            AND task.state IN ('awaiting_input', 'deferred', 'up_for_retry'))")
    [ -z "$runs" ] || refuse "a run is under way ($runs)"
}

stopped=""
finish() {
    rm -rf "$folder.part"
    [ -z "$stopped" ] || docker compose start airflow-scheduler
}
trap finish EXIT

# A task that was killed may have left its container, running or not. Nobody waits for it; nor for any, where the scheduler
# does not run.
if [ -n "$(docker compose ps --quiet --status=running airflow-scheduler)" ]; then
    docker compose exec -T airflow-scheduler python -m dags.orphans
    require_no_step
    require_no_run
    stopped=yes
    docker compose stop airflow-scheduler # so that none starts meanwhile; what serves goes on
else
    docker/end_steps.sh
fi
require_no_step # one may have started while it stopped
mkdir "$folder.part"
for database in airflow mlflow; do
    docker compose exec -T postgres pg_dump --username=postgres --format=custom "$database" >"$folder.part/$database.dump"
done
docker run --rm --network none --volume "$volume:/workspace:ro" --entrypoint tar "$stack-trainer" \
    --create --directory=/workspace . >"$folder.part/workspace.tar"
mv "$folder.part" "$folder"
echo "$folder"
