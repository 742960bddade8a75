#!/usr/bin/env bash
# Prints a Python 3.11 to 3.14 that can make environments: $PYTHON if it is one, else the first that is found. Status 1 if there is none.
for python in "${PYTHON:-python3}" python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
  if "$python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2> /dev/null; then
    echo "$python"
    exit 0
  fi
done
exit 1
