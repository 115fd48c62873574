#!/bin/sh
# Install the programs of Debian that watch the shards in the tests, unless they are here: Prometheus
# and Alertmanager, without the services that their packages start, and Chromium.
set -eu
for program in prometheus promtool prometheus-alertmanager chromium; do
    command -v "$program" > /dev/null || missing=$program
done
[ "${missing-}" ] || exit 0
apt-get update -qq
if ! command -v chromium > /dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
fi
directory=$(mktemp -d)
trap 'rm -r "$directory"' EXIT
cd "$directory"
apt-get download -qq prometheus prometheus-alertmanager
for package in *.deb; do
    dpkg -x "$package" .
done
install usr/bin/* /usr/local/bin
mkdir -p /usr/share/prometheus
cp -r usr/share/prometheus/* /usr/share/prometheus # Alertmanager reads its templates there
