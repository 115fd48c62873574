#!/bin/sh
# Install the programs of Debian that build the image and run pods, unless they are here.
set -eu
for tool in buildah runc debootstrap ip mkfs.ext4; do
    if ! command -v "$tool" > /dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            buildah runc debootstrap iproute2 e2fsprogs golang-github-containers-common
        break
    fi
done
