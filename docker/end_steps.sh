#!/usr/bin/env bash
# Ends the containers of a stack's steps, which a scheduler that is stopped leaves running. A training writes its
# checkpoint first.
#
#   docker/end_steps.sh VOLUME    # the stack's workspace volume; `make down` and docker/restore.sh call it
set -euo pipefail
docker ps --all --quiet --filter "label=toxic.workspace=${1:?the workspace volume}" | while read -r container; do
    docker stop --time=30 "$container" >/dev/null
    docker rm --force "$container" >/dev/null 2>&1 || true # it may remove itself
done
