#!/usr/bin/env bash
# Ray 2.60.0: read_webdataset(decoder=False) decodes all the same, although the annotation of the argument allows a bool:
# the .json of a sample is a dict and the .cls an int, as with the default of True. Only decoder=None leaves the bytes.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'ray[data]==2.60.0'
RAY_USAGE_STATS_ENABLED=0 "$folder/env/bin/python" - "$folder" 2> /dev/null <<'EOF'
import io
import sys
import tarfile

import ray

shard = f'{sys.argv[1]}/shard.tar'
with tarfile.open(shard, 'w') as tar:
    for name, content in ('000.json', b'{"a": 1}'), ('000.cls', b'7'):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')
print('ray', ray.__version__)
found = {}
for decoder in (True, False, None):
    row, = ray.data.read_webdataset(shard, decoder=decoder).take_all()
    found[decoder] = row['json'], row['cls']
    print(f'decoder={decoder}: json is {row["json"]!r}, cls is {row["cls"]!r}')
ray.shutdown()
sys.exit(not (found[True] == found[False] == ({'a': 1}, 7) and found[None] == (b'{"a": 1}', b'7')))
EOF
