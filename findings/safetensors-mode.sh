#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes files that only their owner can read (mode 0600), whatever the umask, and takes the
# permissions of others from a file that it writes again. 0.7.0 and older left the mode to the umask. A model folder on a
# shared disk cannot be loaded by anybody else.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
cat > "$folder/try.py" <<'EOF'
import os
import sys

import numpy as np
import safetensors
from safetensors.numpy import save_file

os.umask(0o022)
path = os.path.join(sys.argv[1], 'weights')
save_file({'x': np.zeros(2)}, path)
new = oct(os.stat(path).st_mode & 0o777)
os.chmod(path, 0o664)
save_file({'x': np.zeros(2)}, path)
again = oct(os.stat(path).st_mode & 0o777)
print('safetensors', safetensors.__version__, 'umask 0o22 ->', new, 'and over a file of 0o664 ->', again)
sys.exit([new, again] != sys.argv[2:])
EOF
for expected in '0.7.0 0o644 0o664' '0.8.0 0o600 0o600'; do
    read -r version new again <<< "$expected"
    "$folder/bin/pip" install --quiet --disable-pip-version-check numpy "safetensors==$version"
    "$folder/bin/python" "$folder/try.py" "$folder" "$new" "$again"
done
