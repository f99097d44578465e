#!/bin/sh
# Fetches CALVIN's simulator (MIT) and installs what it needs, for `--env calvin`:
#   tools/get_calvin_env.sh FOLDER            PYTHON=... chooses another interpreter
# The commit is the one diwa is tested with. Its submodule `tacto` (touch sensors) is not needed.
set -eu
folder="${1:?usage: tools/get_calvin_env.sh FOLDER}"
commit=797142c588c21e76717268b7b430958dbd13bf48
if [ ! -d "$folder/.git" ]; then
  git clone https://github.com/mees/calvin_env.git "$folder"
fi
git -C "$folder" checkout --quiet "$commit"
"${PYTHON:-python3}" -m pip install \
  pybullet gymnasium gym hydra-core omegaconf scipy opencv-python-headless numpy-quaternion gitpython
echo "export CALVIN_ENV_ROOT=$(cd "$folder" && pwd)"
