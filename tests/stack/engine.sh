#!/usr/bin/env bash
# A Docker Engine for the tests of the stack, and images for those of a registry where none can be reached (Debian, root).
#
#   eval "$(tests/stack/engine.sh start)"   # prints the variables that Docker's client and docker-compose.yaml take
#   tests/stack/engine.sh stop              # stops the daemon that it has started, nothing else
#
# An engine that already answers is used as it is. ENGINE_FOLDER holds the data of one that is started here; it must not
# be on an overlay.
set -euo pipefail
cd "$(dirname "$0")"
folder=${ENGINE_FOLDER:-/var/tmp/toxic-engine}
repository=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)
repository=${repository:-http://deb.debian.org/debian}

install_engine() {
    command -v dockerd >/dev/null && command -v debootstrap >/dev/null && return
    apt-get -o DPkg::Lock::Timeout=600 update --quiet
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet --no-install-recommends docker.io debootstrap
}

install_plugins() { # Compose and buildx, which Debian has from its next release on; they need only libc
    docker compose version >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1 && return
    local apt=$folder/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$folder/unpacked" "$DOCKER_CONFIG/cli-plugins"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $repository trixie main" >"$apt/sources.list"
    local options=(
        -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
    )
    apt-get "${options[@]}" --quiet update
    (cd "$apt" && apt-get "${options[@]}" --quiet download docker-compose/trixie docker-buildx/trixie)
    for package in "$apt"/*.deb; do dpkg-deb --extract "$package" "$folder/unpacked"; done
    cp "$folder"/unpacked/usr/libexec/docker/cli-plugins/* "$DOCKER_CONFIG/cli-plugins/"
}

start_daemon() {
    docker version >/dev/null 2>&1 && return
    setsid nohup dockerd --host "$DOCKER_HOST" --mtu 1400 --data-root "$folder/data" --exec-root "$folder/exec" \
        --pidfile "$folder/dockerd.pid" >"$folder/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 150); do
        docker version >/dev/null 2>&1 && return
        sleep 0.2
    done
    tail -20 "$folder/dockerd.log"
    return 1
}

debian_image() { # stands for debian:bookworm-slim and, with a virtual environment as its Python, python:3.11-slim-bookworm
    docker image inspect toxic-test-python >/dev/null 2>&1 && return
    local root=$folder/debian ca=/etc/ssl/certs/ca-certificates.crt
    mkdir -p "$root"
    mount -t tmpfs -o size=2g tmpfs "$root"
    debootstrap --variant=minbase --include=ca-certificates,libpython3.11,python3,python3-venv bookworm "$root" "$repository"
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
    chroot "$root" update-ca-certificates
    chroot "$root" python3 -m venv /usr/local
    tar -C "$root" --exclude='./proc/*' --exclude='./sys/*' --exclude='./var/cache/apt/archives/*.deb' -c . |
        docker import --change "ENV PIP_CERT=$ca SSL_CERT_FILE=$ca PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin" \
            --change 'CMD ["python"]' - toxic-test-python
    umount --lazy "$root/proc" "$root/sys" 2>/dev/null || true
    umount --lazy "$root"
}

stand_ins() {
    debian_image
    for name in postgres haproxy; do
        docker buildx build --build-arg DEBIAN_IMAGE=toxic-test-python --tag "toxic-test-$name" \
            --file "stand-ins/$name.Dockerfile" stand-ins
    done
}

wheels_image() { # what pip is told to look into, as an image: a build sees no folder outside its context
    printf 'FROM scratch\nCOPY *.whl /\n' >"$folder/wheels.Dockerfile"
    docker buildx build --tag toxic-test-wheels --file "$folder/wheels.Dockerfile" "$PIP_FIND_LINKS"
}

start() {
    mkdir -p "$folder"
    if ! docker version >/dev/null 2>&1; then
        export DOCKER_HOST=unix://$folder/docker.sock DOCKER_CONFIG=$folder/docker
    fi
    install_engine
    [ -z "${DOCKER_CONFIG:-}" ] || install_plugins
    start_daemon
    socket=${DOCKER_HOST:-unix:///var/run/docker.sock}
    printed="DOCKER_SOCKET=${socket#unix://}"
    for name in DOCKER_HOST DOCKER_CONFIG; do
        [ -z "${!name:-}" ] || printed+=" $name=${!name}"
    done
    if ! timeout 60 docker pull --quiet python:3.11-slim-bookworm; then
        stand_ins
        printed+=" PYTHON_IMAGE=toxic-test-python POSTGRES_IMAGE=toxic-test-postgres HAPROXY_IMAGE=toxic-test-haproxy"
    fi
    if [ -d "${PIP_FIND_LINKS:-}" ]; then
        wheels_image
        printed+=" WHEELS_IMAGE=toxic-test-wheels TORCH_BACKEND="
    fi
}

case ${1:-} in
start)
    start >&2
    echo "export $printed"
    ;;
stop) # a file that was left behind may name another process by now
    pid=$(cat "$folder/dockerd.pid" 2>/dev/null || true)
    if grep --quiet --no-messages --text --fixed-strings "$folder/dockerd.pid" "/proc/${pid:-none}/cmdline"; then
        kill "$pid"
    fi
    ;;
*)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
