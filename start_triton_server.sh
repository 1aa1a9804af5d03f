#!/usr/bin/env bash
# Starts the Triton server of the workspace in the foreground; Hydra overrides may follow: serving.http_port=9000
# Before any version was put into service, it serves a model.onnx that was copied to
# triton_model_repository/toxic_classificator/1/.
set -euo pipefail
cd "$(dirname "$0")"
python=.venv/tasks/bin/python
[ -x "$python" ] || python=python
exec "$python" -m tasks.serving.triton --by-hand "$@"
