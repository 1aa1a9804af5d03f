#!/usr/bin/env python3
"""Whether a service answers: healthcheck URL [PART]

Ends with 0 if the URL answers with 200 and, with PART, if its JSON says {PART: {"status": "healthy"}}.
"""

import json
import sys
import urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(sys.argv[1], timeout=8) as answer:
    if sys.argv[2:]:
        status = json.load(answer)[sys.argv[2]]["status"]
        sys.exit(0 if status == "healthy" else f"{sys.argv[2]} is {status}")
