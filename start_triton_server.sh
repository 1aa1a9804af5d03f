#!/usr/bin/env bash
# Starts the Triton server of the workspace in the foreground; Hydra overrides may follow: serving.http_port=9000
# Where Docker and a GPU are there, that is NVIDIA's server in the image of docker/triton.Dockerfile, with TensorRT;
# elsewhere the binary in .venv/triton, with ONNX Runtime.
# A model.onnx that was copied by hand to triton_model_repository/toxic_classificator/1/ is served as long as it lies
# there; without one, the version that the last swap put into service.
set -euo pipefail
cd "$(dirname "$0")"

serve=(-m tasks.serving.triton --by-hand)
chosen=" $* " # what was chosen by hand stays

if nvidia-smi -L >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
  image=toxic-triton
  docker build --quiet --tag "$image" --file docker/triton.Dockerfile . || { # only what has changed
    echo "$image could not be built, see above: the one that is there serves, if there is one" >&2
    docker image inspect "$image" >/dev/null
  }
  workspace="$(realpath -m "${TOXIC_WORKSPACE:-workspace}")"
  case "$workspace:$PWD" in *:*:*)
    echo "docker takes a : for the end of a folder's name: move $workspace or $PWD" >&2
    exit 2
    ;;
  esac
  mkdir -p "$workspace"
  [[ "$chosen" == *" profile="* || "$chosen" == *" serving="* ]] || set -- profile=gpu "$@"
  # On the host's network the ports and addresses are those of the configuration, as without a container.
  exec docker run --rm --init --gpus all --network host --shm-size 1g --user "$(id -u):$(id -g)" --env HOME=/tmp \
    --volume "$workspace:/workspace" --volume "$PWD/triton_model_repository:/app/triton_model_repository:ro" \
    "$image" python "${serve[@]}" serving.triton_env=null "$@"
fi

python=.venv/tasks/bin/python
[ -x "$python" ] || python=python
[[ "$chosen" == *" profile="* || "$chosen" == *" serving="* ]] || set -- serving=onnx "$@"
exec "$python" "${serve[@]}" "$@"
