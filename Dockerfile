# The ambassador's image. Works alike with BuildKit and the classic builder, so no RUN --mount.
#
#   docker build --network host -t grand-ambassador .
#
# Where a proxy re-signs TLS, see certs/README.md.
ARG BASE=debian:trixie-slim

# System: what the program needs from Debian, and no compiler.
FROM ${BASE} AS system
COPY certs/ /tmp/certs/
RUN set -eu; \
    if cat /tmp/certs/*.crt > /tmp/certs/all.pem 2>/dev/null; then \
        echo 'Acquire::https::CAInfo "/tmp/certs/all.pem";' > /etc/apt/apt.conf.d/extra-authorities; \
    fi; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /tmp/certs /etc/apt/apt.conf.d/extra-authorities

# Builder: compiler, headers, pip; makes /opt/grand-ambassador, a virtual environment without pip.
FROM system AS builder
ARG PIP_INDEX_URL
COPY certs/ /tmp/certs/
RUN set -eu; \
    if cat /tmp/certs/*.crt > /tmp/certs/all.pem 2>/dev/null; then \
        echo 'Acquire::https::CAInfo "/tmp/certs/all.pem";' > /etc/apt/apt.conf.d/extra-authorities; \
    fi; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3-dev python3-venv; \
    cp /tmp/certs/*.crt /usr/local/share/ca-certificates/ 2>/dev/null && update-ca-certificates || true
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Dependencies before sources: an edited source file then costs only its own compilation.
# Exactly the files of `make lock`: one whose hash is not on the list is not installed.
COPY requirements/ requirements/
RUN set -eu; \
    python3 -m venv /opt/tools; \
    python3 -m venv --without-pip /opt/grand-ambassador; \
    /opt/tools/bin/pip install --require-hashes -r requirements/build.txt; \
    /opt/tools/bin/pip --python /opt/grand-ambassador/bin/python install --no-compile --require-hashes \
        -r requirements/run.txt
COPY . .
# Byte code that is not checked against its source: the image is read-only in spirit, and starts faster.
RUN set -eu; \
    /opt/tools/bin/pip wheel --no-build-isolation --no-deps -w /opt/tools/wheels .; \
    /opt/tools/bin/pip --python /opt/grand-ambassador/bin/python install --no-compile --no-deps /opt/tools/wheels/*.whl; \
    find /opt/grand-ambassador -depth -name tests -type d -exec rm -rf {} +; \
    rm -f /opt/grand-ambassador/bin/[Aa]ctivate* /opt/grand-ambassador/bin/idna /opt/grand-ambassador/bin/normalizer; \
    python3 -m compileall -q --invalidation-mode unchecked-hash /opt/grand-ambassador

FROM system
COPY --from=builder /opt/grand-ambassador /opt/grand-ambassador
ENV PATH=/opt/grand-ambassador/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.title="grand-ambassador" \
      org.opencontainers.image.description="A fully dynamic Docker link ambassador: relays TCP and UDP to a container and follows it through restarts" \
      org.opencontainers.image.licenses="MIT"
ENTRYPOINT ["grand-ambassador"]
