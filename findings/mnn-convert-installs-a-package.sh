#!/usr/bin/env bash
# MNN 3.6.1: importing what the commands mnnconvert and mnn report their use with (MNN/tools/utils/log.py) runs
# "pip install -U aliyun-log-python-sdk", with the pip that PATH finds, which need not be this environment's, and opens a
# URL that is written in base64. Nothing is run here: the lines of the installed file are printed.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check MNN==3.6.1
"$folder/bin/python" - <<'EOF'
import base64
import importlib.metadata
import re
import sys

files = {str(f): f for f in importlib.metadata.files('MNN')}
log = files['MNN/tools/utils/log.py'].read_text()
convert = files['MNN/tools/mnnconvert.py'].read_text()
print('MNN', importlib.metadata.version('MNN'))
installs = [line.strip() for line in log.splitlines() if 'os.system' in line]
urls = [base64.urlsafe_b64decode(text).decode() for text in re.findall(r"b64decode\(b'([^']+)'", log)]
print(*installs, *urls, sep='\n')
sys.exit(installs != ['os.system("pip install -U aliyun-log-python-sdk")'] or not urls[0].startswith('https://')
         or 'from MNN.tools.utils.log import mnn_logger' not in convert)
EOF
