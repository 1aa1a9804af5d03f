# NVIDIA's Triton with the serving steps: the engine is built, staged and served by one TensorRT.
ARG TRITON_RELEASE=25.09
FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3
COPY --from=ghcr.io/astral-sh/uv:0.9 /uv /usr/local/bin/uv
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
# Beside the server's own Python, whose TensorRT the steps see through the system site packages.
RUN uv venv --system-site-packages /opt/tasks \
 && uv pip install --python /opt/tasks/bin/python --compile-bytecode --constraint constraints.txt -r pyproject.toml
RUN useradd --uid 10001 --create-home toxic
COPY commands.py .
COPY .dvc/config .dvc/config
COPY tasks tasks
COPY configs configs
COPY expectations expectations
COPY triton_model_repository triton_model_repository
ENV PATH=/opt/tasks/bin:$PATH TOXIC_WORKSPACE=/workspace PYTHONUNBUFFERED=1
USER toxic
CMD ["python", "-m", "tasks.serving.triton", "profile=gpu", "serving.listen=0.0.0.0"]
