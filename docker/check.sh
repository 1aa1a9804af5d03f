#!/usr/bin/env bash
# What the services' own health checks do not see. `make up` calls it before and after the start.
#
#   docker/check.sh settings    # whether .env names a profile that there is, with a Triton in it
#   docker/check.sh running     # whether Airflow has read both DAGs without an error, and clients reach Triton
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "$*" >&2
    exit 1
}

in_database() {
    docker compose exec -T postgres psql --username=postgres --dbname=airflow --tuples-only --no-align --command="$1"
}

settings() {
    local services profile
    services=$(docker compose config --services)
    [[ $services == *triton-* ]] ||
        fail "no Triton is among the services: COMPOSE_PROFILES is \"${COMPOSE_PROFILES:-$(of_env COMPOSE_PROFILES)}\"" \
            "and has to be cpu or gpu: correct it in .env"
    profile=${TOXIC_PROFILE:-$(of_env TOXIC_PROFILE)}
    [ -e "configs/profile/$profile.yaml" ] ||
        fail "TOXIC_PROFILE is \"$profile\" and has to be one of configs/profile/*.yaml, demo or gpu: correct it in .env"
}

of_env() { sed -n "s/^$1=//p" .env 2>/dev/null | tail -1; }

running() {
    local since errors read address
    # Airflow reads the DAGs some seconds after its start; what it has read before then was of other code.
    since=$(docker inspect --format '{{.State.StartedAt}}' "$(docker compose ps --quiet airflow-dag-processor)")
    until
        read=$(in_database "SELECT count(*) FROM dag WHERE NOT is_stale AND last_parsed_time > '$since'
            AND dag_id IN ('toxicity_weekly', 'toxicity_release')")
        errors=$(in_database "SELECT filename || ': ' || stacktrace FROM import_error WHERE timestamp > '$since'")
        [ -z "$errors" ] || fail "Airflow can not read a DAG: $errors"
        [ "$read" = 2 ]
    do
        [ "$SECONDS" -lt 90 ] || fail "Airflow has not read both DAGs: docker compose logs airflow-dag-processor"
        sleep 1
    done
    address=$(docker compose port gateway 8000)
    exec 3<>"/dev/tcp/${address%:*}/${address##*:}" || fail "nobody listens at $address, the gateway's port on this host"
    printf 'GET /v2/health/live HTTP/1.0\r\n\r\n' >&3
    grep -q '^HTTP/1.. 200 ' <&3 || fail "the gateway at $address has no answer from Triton: docker compose logs gateway"
}

"$1"
