#!/usr/bin/env bash
# Starts the Triton server of the workspace in the foreground; Hydra overrides may follow: serving.http_port=9000
# A model.onnx that was copied by hand to triton_model_repository/toxic_classificator/1/ is served as long as it lies
# there; without one, the version that the last swap put into service.
set -euo pipefail
cd "$(dirname "$0")"
python=.venv/tasks/bin/python
[ -x "$python" ] || python=python
exec "$python" -m tasks.serving.triton --by-hand "$@"
