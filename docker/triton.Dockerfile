# NVIDIA's Triton with the serving steps: the engine is built, staged and served by one TensorRT.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:25.09-py3

# The variable holds the tag, which hadolint does not see.
# hadolint ignore=DL3006
FROM ${TRITON_IMAGE} AS build
ARG UV_VERSION=0.13.9
# Where packages come from, if not from PyPI; only this stage sees it.
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX
ENV UV_LINK_MODE=copy
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /src
# TensorRT's libraries are the server's own; PyPI has the bindings to them, which must be of the same version. Another
# TRITON_IMAGE wants another version here: NVIDIA's support matrix says which.
ARG TENSORRT_VERSION=10.13.3.9
COPY pyproject.toml constraints-images.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --system-site-packages /opt/tasks \
 && uv pip install --python /opt/tasks/bin/python --compile-bytecode --constraint constraints-images.txt -r pyproject.toml \
      "tensorrt-cu13-bindings==${TENSORRT_VERSION}" \
 && printf 'from tensorrt_bindings import *  # noqa\nfrom tensorrt_bindings import __version__\n' \
      >"$(echo /opt/tasks/lib/python3.*/site-packages)/tensorrt.py"

# hadolint ignore=DL3006
FROM ${TRITON_IMAGE}
RUN useradd --uid 10001 --user-group --create-home toxic \
 && install --directory --owner=toxic --group=toxic /workspace \
 # Nothing becomes another user here.
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /opt/tasks /opt/tasks
WORKDIR /app
COPY docker/entrypoint.sh /usr/local/bin/with-secrets
COPY docker/healthcheck.py /usr/local/bin/healthcheck
COPY .dvc/config .dvc/config
COPY commands.py convert_to_tensorrt.sh ./
COPY configs configs
COPY expectations expectations
COPY triton_model_repository triton_model_repository
COPY tasks tasks
ARG VERSION=unknown
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="toxic-triton" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/opt/tasks/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TOXIC_WORKSPACE=/workspace TOXIC_GIT_COMMIT=${GIT_COMMIT}
USER 10001:10001
ENTRYPOINT ["with-secrets"]
CMD ["python", "-m", "tasks.serving.triton", "profile=gpu", "serving.listen=0.0.0.0"]
