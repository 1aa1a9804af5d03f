# The Triton binary of nvidia-pytriton with ONNX Runtime, and the serving steps in an environment of their own: the
# server's Python needs numpy 1, the steps numpy 2.
FROM python:3.11-slim AS build
COPY --from=ghcr.io/astral-sh/uv:0.9 /uv /usr/local/bin/uv
WORKDIR /app
COPY pyproject.toml constraints.txt constraints-triton.txt README.md ./
RUN uv venv /opt/triton \
 && uv pip install --python /opt/triton/bin/python --compile-bytecode --constraint constraints-triton.txt --group triton
RUN uv venv /opt/tasks \
 && UV_TORCH_BACKEND=cpu uv pip install --python /opt/tasks/bin/python --compile-bytecode \
      --constraint constraints.txt -r pyproject.toml

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home toxic
COPY --from=build /opt/triton /opt/triton
COPY --from=build /opt/tasks /opt/tasks
WORKDIR /app
COPY commands.py .
COPY .dvc/config .dvc/config
COPY tasks tasks
COPY configs configs
COPY expectations expectations
COPY triton_model_repository triton_model_repository
ENV PATH=/opt/tasks/bin:$PATH TOXIC_WORKSPACE=/workspace TOXIC_TRITON_ENV=/opt/triton PYTHONUNBUFFERED=1
USER toxic
CMD ["python", "-m", "tasks.serving.triton", "profile=demo", "serving.listen=0.0.0.0"]
