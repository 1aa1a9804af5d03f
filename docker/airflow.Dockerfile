# Airflow: schedules, shows, asks for reviews. No machine-learning package: the steps run in the other images.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
# Where packages come from, if not from PyPI; only this stage sees it.
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX
ENV UV_LINK_MODE=copy
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /src
COPY pyproject.toml constraints-images.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/airflow \
 && uv pip install --python /opt/airflow/bin/python --compile-bytecode --constraint constraints-images.txt \
      --group airflow-image

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --create-home toxic \
 && install --directory --owner=toxic --group=toxic /workspace /logs \
 # Nothing installs packages here, or becomes another user.
 && rm -rf /usr/local/bin/pip* /usr/local/lib/python3.*/site-packages/pip /usr/local/lib/python3.*/site-packages/pip-* \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /opt/airflow /opt/airflow
WORKDIR /app
COPY docker/entrypoint.sh /usr/local/bin/with-secrets
COPY docker/healthcheck.py /usr/local/bin/healthcheck
COPY docker/airflow_init.py docker/airflow_init.py
COPY configs configs
COPY docker/airflow_logins.py docker/login_limit.py dags/plugins/
COPY dags dags
ARG VERSION=unknown
ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="toxic-airflow" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
# AIRFLOW_HOME holds nothing that must outlive the container: configuration is in the environment, state in PostgreSQL.
ENV PATH=/opt/airflow/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    AIRFLOW_HOME=/tmp/airflow AIRFLOW__CORE__DAGS_FOLDER=/app/dags AIRFLOW__CORE__PLUGINS_FOLDER=/app/dags/plugins \
    AIRFLOW__CORE__LOAD_EXAMPLES=False TOXIC_RUNNER=docker TOXIC_WORKSPACE=/workspace
USER 10001:10001
ENTRYPOINT ["with-secrets"]
