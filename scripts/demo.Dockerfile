# Everything that the ambassador is shown and tested with. One image, so that one apt-get fetches it
# all; the stages after `parts` only say what to run. See scripts/images.py.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS parts
# redis-tools and redis-server: the target and its client. dnsmasq-base: the DNS server, without the
# service. python3: echo servers and clients that the tests bring along. iproute2, socat: to look, and
# to be a peer that is not ours.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        dnsmasq-base iproute2 python3 redis-server redis-tools socat \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

FROM parts AS redis
# As in the official image: no configuration file, reachable from other containers, and its keys are
# saved to /data when it is stopped.
WORKDIR /data
CMD ["redis-server", "--protected-mode", "no"]

FROM parts AS redis-cli
ENTRYPOINT ["redis-cli"]

FROM parts AS dnsmasq
# Answers from its arguments only: no upstream, no host's files.
ENTRYPOINT ["dnsmasq", "--keep-in-foreground", "--log-facility=-", "--no-resolv", "--no-hosts", "--user=root"]
