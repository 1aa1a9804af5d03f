# Stands for the official image of PostgreSQL where no image registry is reachable: Debian's server, the same data
# folder, user and POSTGRES_PASSWORD_FILE.
ARG DEBIAN_IMAGE=debian:bookworm-slim
FROM ${DEBIAN_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends postgresql \
 && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/* \
 && install --directory --mode=700 --owner=postgres --group=postgres /var/lib/postgresql/data \
 && install --directory --mode=3777 --owner=postgres --group=postgres /var/run/postgresql
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
COPY postgres.sh /usr/local/bin/
# hadolint ignore=DL3066
USER postgres
ENTRYPOINT ["postgres.sh"]
