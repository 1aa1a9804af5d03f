"""Kaggle as its client sees it: a server on loopback that speaks the calls this project makes.

A call is a POST to /api/v1/<service>/<Method>; a download is answered with a redirect to a signed address of the file,
which takes Range and If-Range as Google's storage does. A test sets what it wants to go wrong.
"""

import base64
import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "KGAT_0123456789abcdef"
SIGNATURE = "X-Goog-Signature=c2lnbmVk"


class FakeKaggle(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}  # name → (the name it is served under, bytes)
        self.version = 1  # of every data set
        self.created = "2020-03-19T12:00:00.000Z"  # of every competition file
        self.bytes = None  # size that is said, instead of the real one
        self.fail = {}  # method → list of (status, headers) for its next calls; the last one stays
        self.cuts = []  # after how many bytes the next downloads break off; None for one that does not
        self.damaged = False  # the bytes on the wire differ from the MD5 that is sent
        self.portal = False  # every call is answered with a web page, as the login page of a network does
        self.pause = {}  # method → seconds before it answers; "file": in the middle of a download
        self.calls = []  # names of the methods called, "file" for a download
        self.ranges = []  # Range header of each download

    def handle_error(self, request, client_address):
        pass  # a client that was killed, or goes on from where it stopped, leaves in the middle of an answer

    @property
    def environment(self):
        """What makes Kaggle's client take this server for Kaggle."""
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": f"http://127.0.0.1:{self.server_port}",
            "no_proxy": "",
            "KAGGLE_API_TOKEN": TOKEN,
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        method = self.path.rsplit("/", 1)[1]
        kaggle = self.server
        kaggle.calls.append(method)
        time.sleep(kaggle.pause.get(method, 0))
        if kaggle.portal and method != "IntrospectToken":
            return self.answer(200, None, (), b"<html>Log in</html>")
        if failures := kaggle.fail.get(method):
            status, headers = failures.pop(0) if len(failures) > 1 else failures[0]
            if status:
                return self.answer(status, {"code": status, "message": f"refused, {TOKEN} it said"}, headers)
        if method == "IntrospectToken":
            self.answer(200, {"active": body["token"] == TOKEN, "username": "somebody"})
        elif method == "ListDataFiles":
            listed = [
                {"name": name, "totalBytes": kaggle.bytes or len(data), "creationDate": kaggle.created}
                for name, (_, data) in kaggle.files.items()
            ]
            self.answer(200, {"files": listed})
        elif method == "GetDataset":
            size = kaggle.bytes or sum(len(data) for _, data in kaggle.files.values())
            updated = f"2026-01-0{kaggle.version}T00:00:00.000Z"
            self.answer(200, {"currentVersionNumber": kaggle.version, "lastUpdated": updated, "totalBytes": size})
        elif method in ("DownloadDataFile", "DownloadDataset") and body["fileName"] in kaggle.files:
            served = kaggle.files[body["fileName"]][0]
            self.answer(302, None, {"Location": f"http://localhost/{body['fileName']}/{served}?{SIGNATURE}"})
        else:
            self.answer(404, {"code": 404, "message": "not found"})

    def do_GET(self):
        kaggle = self.server
        kaggle.calls.append("file")
        kaggle.ranges.append(self.headers.get("Range"))
        _, name, served = self.path.split("?")[0].replace("http://localhost", "").split("/")
        data = kaggle.files[name][1]
        md5, start, status = hashlib.md5(data), 0, 200
        etag = f'"{md5.hexdigest()}"'
        if self.headers.get("Range") and self.headers.get("If-Range") == etag:
            start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
        if kaggle.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Type", "text/html" if served.endswith(".html") else "application/zip")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={base64.b64encode(md5.digest()).decode()}")
        self.end_headers()
        cut = kaggle.cuts.pop(0) if kaggle.cuts else None
        half = (start + len(data)) // 2
        self.wfile.write(data[start : min(half, cut or half)])
        self.wfile.flush()
        time.sleep(kaggle.pause.get("file", 0))
        self.wfile.write(data[half:cut])
        self.close_connection = cut is not None

    def answer(self, status, body, headers=(), page=None):
        content = page or (b"" if body is None else json.dumps(body).encode())
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
