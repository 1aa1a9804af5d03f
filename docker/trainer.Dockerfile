# Every step but those that need the server's own binaries; and the MLflow server.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# An image of wheels that are taken before those of the index, at its root.
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels

# This stage and the first steps of the last one are the same in trainer and triton-cpu, so that they are built and kept
# once.
FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
# Where packages come from, if not from PyPI; only this stage sees it.
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX
ENV UV_LINK_MODE=copy
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /src
# PyPI's torch is the one with CUDA; TORCH_BACKEND=cpu takes PyTorch's own for a CPU, a tenth of the size.
ARG TORCH_BACKEND
# s3, gs or ssh: what a DVC remote of that kind needs.
ARG DVC_EXTRA
COPY pyproject.toml constraints-images.txt ./
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,from=wheels,target=/wheels \
    uv venv /opt/tasks \
 && uv pip install --python /opt/tasks/bin/python --compile-bytecode --find-links /wheels \
      ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} --constraint constraints-images.txt -r pyproject.toml --group mlflow-image \
      ${DVC_EXTRA:+--extra=$DVC_EXTRA}

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --create-home toxic \
 && install --directory --owner=toxic --group=toxic /workspace \
 # Nothing installs packages here, or becomes another user.
 && rm -rf /usr/local/bin/pip* /usr/local/lib/python3.*/site-packages/pip /usr/local/lib/python3.*/site-packages/pip-* \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /opt/tasks /opt/tasks
# torch.compile builds its kernels' launchers where it runs. Debian keeps one version of a package, and mends it: to pin it
# would only break the build.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY docker/entrypoint.sh /usr/local/bin/with-secrets
COPY docker/healthcheck.py /usr/local/bin/healthcheck
COPY docker/login_limit.py docker/mlflow_app.py docker/mlflow_init.py docker/
COPY docker/toxic_mlflow-1.dist-info docker/toxic_mlflow-1.dist-info
COPY .dvc/config .dvc/config
COPY commands.py ./
COPY configs configs
COPY expectations expectations
COPY triton_model_repository triton_model_repository
COPY tasks tasks
ARG VERSION=unknown
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="toxic-trainer" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/opt/tasks/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TOXIC_WORKSPACE=/workspace TOXIC_GIT_COMMIT=${GIT_COMMIT}
USER 10001:10001
ENTRYPOINT ["with-secrets"]
CMD ["python", "commands.py"]
