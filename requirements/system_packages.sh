#!/usr/bin/env bash
# Installs the Debian packages that this set-up uses and that are missing, and says so. It needs root or a sudo that asks for no
# password. Where it cannot install them it prints one line that names them; what needs them is then skipped or says so. Ends with
# status 0 in any case.
#
#   requirements/system_packages.sh [PACKAGE[:COMMAND]...]   the packages named, too: those whose command is missing, such as make,
#                                                            or etcd-server:etcd if the two have different names
#
# INSTALL=no: only name what is missing.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin  # ldconfig; users other than root often lack them

libraries=$(ldconfig -p 2> /dev/null)

missing=()
for package in "$@"; do
  command -v "${package##*:}" > /dev/null || missing+=("${package%%:*}")
done
# vLLM and triton compile small host programs at run time, against Python's headers. Other Pythons than Debian's bring their own.
if ! python=$("$(dirname "$0")/find_python.sh"); then
  missing+=(python3 python3-venv python3-dev)
elif ! "$python" -c 'import os, sys, sysconfig
sys.exit(sys.base_prefix == "/usr" and not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
  missing+=(python3-dev)
fi
command -v g++ > /dev/null || missing+=(g++ libc6-dev)
# Tests of remote stores run real servers: redis-server, and mooncake_master from its wheel, which loads libcurl and RDMA's
# libraries. libcachesim, which the policies are compared with, loads glib.
command -v redis-server > /dev/null || missing+=(redis-server)
[[ $libraries == *libibverbs.so.1* ]] || missing+=(libibverbs1)
[[ $libraries == *libnuma.so.1* ]] || missing+=(libnuma1)
[[ $libraries == *libcurl.so.4* ]] || missing+=(libcurl4)
[[ $libraries == *libglib-2.0.so.0* ]] || missing+=(libglib2.0-0)
[ ${#missing[@]} -gt 0 ] || exit 0

name_them() {
  echo "set-up: missing system packages (Debian's names): ${missing[*]}. $1. What needs them is skipped or says so."
  exit 0
}
if [ "${INSTALL:-yes}" = no ]; then name_them "INSTALL=no"; fi
command -v apt-get > /dev/null || name_them "There is no apt-get: install them with this system's package manager"
as_root=()
if [ "$(id -u)" != 0 ]; then
  sudo -n true 2> /dev/null || name_them "This user may not install: run sudo apt-get install ${missing[*]}"
  as_root=(sudo -n)
fi

echo "set-up: installing system packages: ${missing[*]}"
log=$(mktemp)
# RUNLEVEL=1: Debian's packages start their services at installation, unless this is the runlevel.
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -o DPkg::Lock::Timeout=120 "$@" >> "$log" 2>&1; }
apt update
if ! apt install -y --no-install-recommends "${missing[@]}"; then
  wanted=("${missing[@]}") missing=()
  for package in "${wanted[@]}"; do
    apt install -y --no-install-recommends "$package" || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    tail -n 3 "$log" | sed 's/^/  /'
    rm -f "$log"
    name_them "apt-get failed with the lines above"
  fi
fi
rm -f "$log"
