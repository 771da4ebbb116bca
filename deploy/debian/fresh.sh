#!/usr/bin/env bash
# fresh.sh [suite]: try the README's front door in a new Debian with Python and nothing else, as root and as a plain user.
#
# Needs root and debootstrap. It has a folder, mounts and process ids of its own, and leaves nothing behind. What the
# network of this machine asks for is carried over: name resolution, extra CA certificates, pip's environment.
set -euo pipefail

suite=${1:-bookworm}
here=$(cd "$(dirname "$0")/../.." && pwd)
root=$(mktemp -d "${TMPDIR:-/var/tmp}/bide-fresh.XXXXXX")
trap 'rm -rf --one-file-system "$root"' EXIT
chmod 755 "$root"

if ! debootstrap --variant=minbase --include=python3,python3-venv,make,git,ca-certificates "$suite" "$root" >"$root.log" 2>&1; then
  tail -20 "$root.log"
  exit 1
fi
rm -f "$root.log"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
if [ -d /usr/local/share/ca-certificates ]; then
  cp -rL /usr/local/share/ca-certificates "$root/usr/local/share/"
fi
git clone -q "$here" "$root/srv/bide"
echo "== Debian $suite made  $SECONDS s"

# shellcheck disable=SC2016 # expanded inside
unshare --mount --pid --fork --kill-child sh -c '
  mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount -t tmpfs tmpfs "$0/tmp" &&
  exec chroot "$0" /usr/bin/env PATH=/usr/sbin:/usr/bin:/sbin:/bin python3 -u /srv/bide/deploy/debian/front_door.py
' "$root"
