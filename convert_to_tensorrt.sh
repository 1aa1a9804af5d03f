#!/usr/bin/env bash
# Builds a TensorRT engine from an ONNX file: `python commands.py build_engine` under a name people know.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 MODEL.onnx MODEL.trt [serving.workspace_gib=8 …]" >&2
  exit 2
fi
onnx="$(realpath -m "$1")" output="$(realpath -m "$2")"
shift 2
cd "$(dirname "$0")"
python=.venv/tasks/bin/python
[ -x "$python" ] || python=python
exec "$python" commands.py build_engine serving=tensorrt "$@" --onnx "$onnx" --output-path "$output"
