# Every step but those that need the server's own TensorRT. CUDA's torch by default; TORCH_BACKEND=cpu for a CPU host.
FROM python:3.11-slim AS build
ARG TORCH_BACKEND=auto
COPY --from=ghcr.io/astral-sh/uv:0.9 /uv /usr/local/bin/uv
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
RUN uv venv /opt/tasks \
 && UV_TORCH_BACKEND=$TORCH_BACKEND uv pip install --python /opt/tasks/bin/python --compile-bytecode \
      --constraint constraints.txt -r pyproject.toml

FROM python:3.11-slim
# torch.compile builds its kernels' launchers where it runs.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home toxic
COPY --from=build /opt/tasks /opt/tasks
WORKDIR /app
COPY commands.py ./
COPY .dvc/config .dvc/config
COPY tasks tasks
COPY configs configs
COPY expectations expectations
COPY triton_model_repository triton_model_repository
ARG GIT_COMMIT=unknown
ENV PATH=/opt/tasks/bin:$PATH TOXIC_WORKSPACE=/workspace PYTHONUNBUFFERED=1 TOXIC_GIT_COMMIT=$GIT_COMMIT
USER toxic
CMD ["python", "commands.py"]
