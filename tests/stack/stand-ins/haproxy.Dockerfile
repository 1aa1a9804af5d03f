# Stands for the official image of HAProxy where no image registry is reachable.
ARG DEBIAN_IMAGE=debian:bookworm-slim
FROM ${DEBIAN_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends haproxy \
 && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3066
USER haproxy
CMD ["haproxy", "-v"]
