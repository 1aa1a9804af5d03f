# Airflow: schedules, shows, asks for reviews. No ML package: the steps run in the other images.
FROM python:3.11-slim AS build
COPY --from=ghcr.io/astral-sh/uv:0.9 /uv /usr/local/bin/uv
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN uv venv /opt/airflow-env \
 && uv pip install --python /opt/airflow-env/bin/python --compile-bytecode --constraint constraints.txt --group airflow

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home toxic
COPY --from=build /opt/airflow-env /opt/airflow-env
WORKDIR /app
COPY dags dags
COPY tasks tasks
COPY configs configs
ENV PATH=/opt/airflow-env/bin:$PATH PYTHONPATH=/app AIRFLOW_HOME=/workspace/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/app/dags AIRFLOW__CORE__PLUGINS_FOLDER=/app/dags/plugins \
    AIRFLOW__CORE__LOAD_EXAMPLES=false TOXIC_RUNNER=docker
USER toxic
