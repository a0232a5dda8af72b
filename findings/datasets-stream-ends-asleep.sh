#!/usr/bin/env bash
# datasets 5.2.0: a pass over a shuffled stream of several Parquet files ends with a sleep of five seconds, whatever its
# length and even where it is left after the first row (config.SLEEP_TIME_ON_THREADS_SHUTDOWN, to let threads of PyArrow
# end). The same stream in its own order does not sleep. Every epoch of a training on such a stream takes as much longer.
#
# Prints the versions and the seconds; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==25.0.0
cd "$folder"
"$folder/bin/python" - <<'EOF'
import sys
import time

import datasets
import pyarrow as pa
import pyarrow.parquet

print('datasets', datasets.__version__, 'pyarrow', pa.__version__)
datasets.disable_progress_bars()
for i in range(2):
    pa.parquet.write_table(pa.table(dict(label=list(range(4)))), f'{i}.parquet')
stream = datasets.load_dataset('parquet', data_files=['0.parquet', '1.parquet'], split='train', streaming=True)
list(stream)
seconds = {}
for name, rows in dict(ordered=stream, shuffled=stream.shuffle(seed=0, buffer_size=4)).items():
    start = time.monotonic()
    count = len(list(rows))
    seconds[name] = time.monotonic() - start
    print(f'{name}: {count} rows in {seconds[name]:.1f} s')
start = time.monotonic()
for _ in stream.shuffle(seed=0, buffer_size=4):
    break
seconds['left'] = time.monotonic() - start
print(f"shuffled, left after one row: {seconds['left']:.1f} s")
sys.exit(not (seconds['ordered'] < 2 and min(seconds['shuffled'], seconds['left']) > 4))
EOF
