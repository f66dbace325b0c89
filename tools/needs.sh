#!/usr/bin/env bash
# needs.sh python uv==VERSION   a Python >= 3.10 with venv, and uv (from PyPI where the machine has none)
# needs.sh buf buf-bin==VERSION buf, from PyPI where the machine has none; without it lint goes on
# needs.sh postgres             a Postgres server for the tests of the store; without it they are skipped
# needs.sh services             systemd-analyze and ip for the tests of units and of machines; without them these are skipped
# Whatever is fetched goes to .cache/tools and is linked from .cache/bin; says nothing when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { echo "needs: $*" >&2; }

python=
find_python() {
  local p
  for p in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python3.10; do
    if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$p; return; fi
  done
  say 'no Python 3.10 or newer; install one (Debian: apt-get install python3 python3-venv) or set PYTHON=PATH'
  return 1
}

# Debian splits ensurepip off into python3-venv.
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
need_venv() {
  has_venv && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say 'installing python3-venv'
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    { apt-get update -q && { apt-get install -qy --no-install-recommends python3-venv && has_venv || apt-get install -qy --no-install-recommends "python$version-venv"; }; } >&2
  fi
  has_venv || { say "$python has no venv module; install it (Debian: apt-get install python3-venv)"; return 1; }
}

# fetch COMMAND REQUIREMENT: from PyPI into .cache/tools; another make may be at it, so one at a time.
fetch() {
  mkdir -p .cache/bin
  exec 9>.cache/tools.lock
  if command -v flock >/dev/null; then flock 9; fi
  if [ ! -x ".cache/tools/bin/$1" ]; then
    find_python && need_venv || return 1
    [ -x .cache/tools/bin/pip ] || "$python" -m venv .cache/tools
    say "fetching $2 from the package index"
    .cache/tools/bin/pip install -q --disable-pip-version-check "$2" >&2 || return 1
  fi
  ln -sfn "../tools/bin/$1" ".cache/bin/$1"
  exec 9>&-
}

case ${1:-} in
python)
  find_python
  need_venv
  uv --version >/dev/null 2>&1 || fetch uv "$2" || say 'no uv: environments are built by venv and pip, which is slower'
  ;;
buf)
  buf --version >/dev/null 2>&1 || fetch buf "$2" || say 'buf cannot be had'
  ;;
postgres)
  has_postgres() { command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }
  if ! has_postgres && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say 'installing postgresql'
    # The tests start servers of their own; the package is to start none.
    mkdir -p /etc/postgresql-common/createcluster.d
    [ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/tests.conf
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends postgresql; } >&2 || true
  fi
  has_postgres || say 'no Postgres: the tests that need it are skipped (Debian: apt-get install postgresql)'
  ;;
services)
  # Debian's names of the packages are those of the projects.
  lacks=()
  command -v systemd-analyze >/dev/null || lacks+=(systemd)
  PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null || lacks+=(iproute2)
  if [ ${#lacks[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${lacks[*]}"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${lacks[@]}"; } >&2 || true
  fi
  command -v systemd-analyze >/dev/null || say 'no systemd-analyze: the units are not checked (Debian: apt-get install systemd)'
  PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null || say 'no ip: the test of several machines is skipped (Debian: apt-get install iproute2)'
  ;;
*)
  say "usage: needs.sh python|buf|postgres|services [REQUIREMENT]"; exit 2 ;;
esac
