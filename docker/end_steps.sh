#!/usr/bin/env bash
# Ends the containers of the stack's steps, which a scheduler that is stopped leaves running. A training writes its
# checkpoint first. `make down` and docker/restore.sh call it.
set -euo pipefail
cd "$(dirname "$0")/.."
volume=$(docker compose config | sed -n 's/^name: //p')-workspace
docker ps --all --quiet --filter "label=toxic.workspace=$volume" | while read -r container; do
    docker stop --time=30 "$container" >/dev/null
    docker rm --force "$container" >/dev/null 2>&1 || true # it may remove itself
done
