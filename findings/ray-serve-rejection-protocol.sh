#!/usr/bin/env bash
# Ray Serve 2.60.0: nothing reads RequestRouter.supports_rejection_protocol, although its docstring says that a router
# which guarantees capacity should return False to skip the handling of rejections. So every request of every router is a
# stream of two messages, whether the replica accepts and the answer, instead of one.
#
# Prints the version and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'ray[serve]==2.60.0'
cat > "$folder/try.py" <<'EOP'
import os
import sys
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter


class Router(RequestRouter):
    async def choose_replicas(self, candidate_replicas, pending_request=None):
        Path(os.environ['FOUND'], 'choose_replicas').touch()
        return [candidate_replicas]

    @property
    def supports_rejection_protocol(self):
        Path(os.environ['FOUND'], 'supports_rejection_protocol').touch()
        return False


@serve.deployment(request_router_config=RequestRouterConfig(request_router_class=Router))
class Answer:
    def __call__(self):
        return 1


ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')
serve.start(proxy_location='Disabled')
answer = serve.run(Answer.bind(), route_prefix=None).remote().result()
ray.shutdown()
called = os.listdir(os.environ['FOUND'])
print('ray', ray.__version__, 'answered', answer, 'and used', called)
sys.exit(called != ['choose_replicas'])
EOP
mkdir "$folder/found"
FOUND=$folder/found RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 "$folder/env/bin/python" "$folder/try.py" 2> /dev/null
