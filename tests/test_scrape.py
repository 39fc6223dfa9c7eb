"""scrape.py against a real board on loopback, well-behaved or not. python -m pytest tests/test_scrape.py"""
import csv
import email.utils
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import scrape

SCRIPT = Path(scrape.__file__)
CONTACT = "me@example.org"
HTML = b"<!DOCTYPE html><title>Just a moment...</title>"


def picture(number, size=600):
    """Bytes that are different for every number; nobody decodes them here."""
    return (b"\x89PNG\r\n\x1a\n" + hashlib.sha256(str(number).encode()).digest() * (size // 32 + 1))[:size]


def post(number, body=None, **more):
    """A Moebooru post that passes every filter."""
    body = picture(number) if body is None else body
    return dict(id=number, tags="landscape sky someone", md5=hashlib.md5(body).hexdigest(), file_size=len(body),
                file_url=f"/image/{number}.png", width=3840, height=2160, rating="s", parent_id=None,
                has_children=False, source=f"https://art.example/{number}", status="active") | more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:         # the client has gone
            pass

    def send(self, status, body=b"", length=True, **headers):
        """A whole answer; length False leaves it out, a number is sent in its place."""
        self.send_response_only(status)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is True else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_GET(self):
        board, path = self.server.board, unquote(urlsplit(self.path).path)
        with board.lock:
            board.log.append((time.monotonic(), self.path, dict(self.headers)))
            odd = board.once[path].pop(0) if board.once.get(path) else board.always.get(path)
        if odd:
            odd(self)
        elif path in ("/post.json", "/posts.json"):
            asked = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
            found, first = board.posts, (int(asked["page"]) - 1) * int(asked["limit"])
            found = found[first:first + int(asked["limit"])]
            if asked.get("api_version") == "2":
                found = dict(posts=found, tags=board.types)
            self.send(200, json.dumps(found).encode(), Content_Type="application/json")
        elif urlsplit(self.path).query.isdigit():
            self.send(200, picture(int(urlsplit(self.path).query)))
        elif path in board.files:
            self.send(200, board.files[path], Content_Type="image/png")
        else:
            self.send(404, HTML, Content_Type="text/html")


class Board:
    """A board of these posts, whose files are picture(id). once: path -> odd answers to give first; always: path -> one
    to give every time."""

    def __init__(self, posts):
        self.posts, self.types = posts, {"someone": "artist", "sky": "general"}
        self.log, self.lock = [], threading.Lock()
        self.files = {urlsplit(p["file_url"]).path: picture(p["id"]) for p in posts if p.get("file_url")}
        self.once, self.always = {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.board, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def asked(self, beginning="/"):
        """The paths that were asked for, searches apart from their questions."""
        return [unquote(urlsplit(path).path) for _, path, _ in self.log if path.startswith(beginning)]

    def times(self):
        return [t for t, _, _ in self.log]


@pytest.fixture
def make(request):
    boards = []

    def board(*posts):
        boards.append(Board(list(posts)))
        return boards[-1]
    yield board
    for b in boards:
        b.server.shutdown()
        b.server.server_close()


@pytest.fixture
def go(monkeypatch, capsys, tmp_path):
    """go(board, flag, ...) -> (exit code, stdout, stderr) of scrape.py's main() into tmp_path/out."""
    def run(board, *flags, pause=0.002, kind="konachan", out=tmp_path / "out"):
        monkeypatch.setattr(scrape.say, "__defaults__", (False, [time.monotonic()]))     # as in a process of its own
        monkeypatch.setattr(sys, "argv", ["scrape.py", kind, "--url", board.url, "--pause", str(pause), "-o", str(out),
                                          "--contact", CONTACT, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            scrape.main()
        said = capsys.readouterr()
        return end.value.code, said.out, said.err
    return run


def manifest(out):
    with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def in_order(out, numbers=None):
    """Whether the folder holds a manifest and exactly its pictures, each of them whole, and no other file."""
    rows = manifest(out) if (out / "manifest.csv").exists() else []
    assert {p.name for p in out.iterdir()} == {r["file"] for r in rows} | ({"manifest.csv"} if rows else set())
    assert len({r["file"] for r in rows}) == len(rows)
    for r in rows:
        body = (out / r["file"]).read_bytes()
        assert body == picture(int(r["id"]), len(body)) and hashlib.md5(body).hexdigest() == r["md5"]
        assert str(len(body)) == r["size"] and all(r[c] is not None for c in scrape.COLUMNS)
    assert numbers is None or {int(r["id"]) for r in rows} == set(numbers)
    return True


def one_error(said):
    """The single line of an error, after lines about waiting."""
    lines = [line for line in said.splitlines() if "; waiting " not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in said, said
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# A well-behaved board
# ---------------------------------------------------------------------------------------------------------------------


def test_300_posts_give_exactly_the_filtered_set_and_a_second_run_fetches_nothing(make, go, tmp_path):
    odd = [dict(rating="q"), dict(rating="e"), dict(width=3839), dict(parent_id=7), dict(has_children=True),
           dict(tags="landscape Left_Out"), dict(file_url="/image/film.mp4"), dict(file_url=None), dict(md5="0")]
    posts = [post(n, **(odd[n // 3 % len(odd)] if n % 3 == 0 else {})) for n in range(300, 0, -1)]
    board, out = make(*posts), tmp_path / "out"
    (tmp_path / "leave").write_text("nobody_here\nleft out\n\n")
    flags = ["--tags", "landscape -chibi", "--max", 1000, "--opt-out", tmp_path / "leave"]
    code, told, said = go(board, *flags)
    assert code == 0 and in_order(out, [n for n in range(1, 301) if n % 3])
    assert "200 pictures fetched" in told and all(f"{n} {why}" in said for n, why in (
        (23, "of another rating"), (11, "too narrow"), (22, "variants"), (11, "opted out"), (11, "no pictures"),
        (22, "without a file")))
    assert sorted(board.asked("/image")) == sorted(f"/image/{n}.png" for n in range(1, 301) if n % 3)
    assert board.asked("/post.json") == ["/post.json"] * 4      # three pages and an empty one
    question = parse_qs(urlsplit(board.log[0][1]).query)
    assert set(question["tags"][0].split()) == {"landscape", "-chibi", "rating:s", "width:>=3840"}
    assert all(CONTACT in headers["User-Agent"] for *_, headers in board.log)
    row = {r["id"]: r for r in manifest(out)}["1"]
    place = board.url[7:].replace(":", "-")
    assert row == dict(id="1", board=place, page=f"{board.url}/post/show/1", url=f"{board.url}/image/1.png",
                       md5=posts[-1]["md5"], size="600", width="3840", height="2160", rating="safe",
                       tags="landscape sky someone", artists="someone", source="https://art.example/1", licence="",
                       file=f"{place}-1-{posts[-1]['md5'][:8]}.png")

    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    board.log.clear()
    code, told, said = go(board, *flags, "--resume")
    assert code == 0 and "0 pictures fetched" in told and "200 were here" in said
    assert board.asked() == ["/post.json"] * 4
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize("rating, asked, fetched", [("s", "rating:g", "g"), ("sq", "rating:g,q,s", "gsq"),
                                                    ("q", "rating:q,s", "sq"), ("qse", None, "gsqe")])
def test_danbooru_and_its_ratings(make, go, tmp_path, rating, asked, fetched):
    def theirs(number, letter):
        p = post(number, rating=letter, tag_string="landscape sky someone", tag_string_artist="someone",
                 image_width=3840, image_height=2160, license="CC BY 4.0")
        return {k: v for k, v in p.items() if k not in ("tags", "width", "height")}
    board = make(*(theirs(n, letter) for n, letter in enumerate("gsqe", 1)), theirs(5, "x"),
                 theirs(6, "g") | dict(is_banned=True))
    code, *_ = go(board, "--rating", rating, "--tags", "landscape sky", kind="danbooru")
    assert code == 0 and in_order(tmp_path / "out", ["gsqe".index(letter) + 1 for letter in fetched])
    question = parse_qs(urlsplit(board.log[0][1]).query)
    assert board.asked()[0] == "/posts.json" and question["tags"][0].split() == [
        "landscape", "sky", *filter(None, [asked]), "width:>=3840"]
    words = {r["id"]: r["rating"] for r in manifest(tmp_path / "out")}
    assert words == {i: w for i, w, letter in zip("1234", ("general", "sensitive", "questionable", "explicit"), "gsqe")
                     if letter in fetched}
    row = manifest(tmp_path / "out")[0]
    assert (row["artists"], row["licence"]) == ("someone", "CC BY 4.0") and re.search(r"/posts/\d$", row["page"])


@pytest.mark.parametrize("rating, asked", [("s", ["rating:s"]), ("qs", ["-rating:e"]), ("sqe", [])])
def test_moebooru_is_asked_for_the_rating(make, go, rating, asked):
    board = make()
    assert go(board, "--rating", rating, "--min-width", 0)[0] == 0
    assert parse_qs(urlsplit(board.log[0][1]).query).get("tags", [""])[0].split() == asked


def test_variants_width_and_max(make, go, tmp_path):
    board = make(post(1, parent_id=3), post(2, has_children=True), post(3, width=100), post(4), post(5))
    code, *_ = go(board, "--variants", "--min-width", 100, "--max", 4)
    assert code == 0 and in_order(tmp_path / "out", [1, 2, 3, 4]) and board.asked("/post.json") == ["/post.json"]


def test_dry_run_counts_and_makes_nothing(make, go, tmp_path):
    board = make(*map(post, range(5)), post(9), post(10, rating="e"))       # 0 is no id
    code, told, said = go(board, "--dry-run")
    assert code == 0 and told.startswith("5 to fetch, 0.0 MB") and "1 of another rating" in said
    assert not board.asked("/image") and not (tmp_path / "out").exists()


def test_the_pace_by_the_servers_clock(make, go, tmp_path):
    board = make(post(1), post(2))
    board.once = {"/image/1.png": [lambda h: h.send(302, Location="/image/2.png?again")]}
    board.posts[0] = post(1, picture(2))
    board.posts[1] = post(3, file_url="/image/1.png", body=picture(1))
    code, *_ = go(board, "--max", 2, pause=1)
    times = board.times()
    assert code == 0 and len(times) == 4        # search, redirect, picture, picture
    assert all(1.0 <= b - a < 4 for a, b in zip(times, times[1:])), times


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and back-off
# ---------------------------------------------------------------------------------------------------------------------


def test_429_with_retry_after_is_waited_for(make, go, tmp_path):
    board = make(post(1), post(2))

    def soon(h):
        h.send(429, Retry_After=email.utils.formatdate(time.time() + 2, usegmt=True))
    board.once = {"/post.json": [lambda h: h.send(429, Retry_After="1")], "/image/1.png": [soon]}
    code, _, said = go(board, "--max", 2)
    t = board.times()
    assert code == 0 and in_order(tmp_path / "out", [1, 2]) and len(t) == 5
    assert t[1] - t[0] >= 1 and t[3] - t[2] >= 0.99       # a date has whole seconds: 1 to 2 s from then
    assert said.count("waiting") == 2


def test_back_off_doubles(make, go, tmp_path):
    board = make(post(1))
    board.once = {"/image/1.png": [lambda h: h.send(429), lambda h: h.send(503, b"{}"), lambda h: h.send(502, HTML),
                                   lambda h: h.send(421)]}
    code, *_ = go(board, "--max", 1, pause=0.03)
    t = board.times()[1:]
    assert code == 0 and in_order(tmp_path / "out", [1])
    assert all(b - a >= 0.03 * 2 ** n for n, (a, b) in enumerate(zip(t, t[1:]), 1))


def test_429_for_ever_ends_the_run(make, go, tmp_path):
    board = make(post(1), post(2), post(3))
    board.always = {"/image/2.png": lambda h: h.send(429)}
    code, _, said = go(board)
    assert code == 2 and "429" in one_error(said) and in_order(tmp_path / "out", [1])
    assert board.asked("/image") == ["/image/1.png"] + ["/image/2.png"] * scrape.TRIES


def test_500s_on_one_picture(make, go, tmp_path):
    board = make(post(1), post(2), post(3))
    board.always = {"/image/2.png": lambda h: h.send(500, HTML, Content_Type="text/html")}
    code, told, said = go(board)
    assert code == 1 and in_order(tmp_path / "out", [1, 3]) and re.search(r"failed: \S+-2-\S+: 500", said)
    assert board.asked("/image").count("/image/2.png") == scrape.TRIES and "1 failed" in told
    board.always.clear()
    board.log.clear()
    assert go(board)[0] == 0 and in_order(tmp_path / "out", [1, 2, 3]) and board.asked("/image") == ["/image/2.png"]


def test_a_board_that_is_down(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "TRIES", 2)
    board = make(*map(post, range(1, 9)))
    board.always = {f"/image/{n}.png": lambda h: h.send(500) for n in range(2, 9)}
    code, _, said = go(board)
    assert code == 2 and "no answer" in said.splitlines()[-1] and in_order(tmp_path / "out", [1])
    assert len(board.asked("/image")) == 1 + 2 * scrape.IN_A_ROW
    board.always = {"/post.json": lambda h: h.send(500)}
    board.log.clear()
    assert go(board)[0] == 2 and len(board.log) == 2
    board.server.shutdown()
    board.server.server_close()
    code, _, said = go(board)
    assert code == 2 and "refused" in one_error(said).lower()


def test_a_very_long_retry_after_is_not_sat_out(make, go, monkeypatch):
    board, sleep = make(post(1)), time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: sleep(s) if s < 5 else pytest.fail(f"sleeps {s} s"))
    board.always = {"/post.json": lambda h: h.send(503, Retry_After="86400")}
    code, _, said = go(board)
    assert code == 2 and "1440:00" in one_error(said) and len(board.log) == 1


@pytest.mark.parametrize("value, seconds", [(None, 0), ("7", 7), (" 7 ", 7), ("-7", 0), ("soon", 0), ("", 0),
                                            ("nan", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
                                            ("Wed, 99 Oct 2015", 0)])
def test_retry_after(value, seconds):
    assert scrape.retry_after(value) == seconds
    then = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < scrape.retry_after(then) <= 100


CHALLENGES = dict(html=lambda h: h.send(200, HTML, Content_Type="text/html"),
                  indented=lambda h: h.send(200, b"\n  " + HTML),
                  worded=lambda h: h.send(403, b"Attention Required!", Content_Type="text/html"),
                  forbidden=lambda h: h.send(403, HTML, Content_Type="text/html", Server="cloudflare"),
                  old=lambda h: h.send(503, HTML, Content_Type="text/html", Server="cloudflare"),
                  mitigated=lambda h: h.send(403, b"{}", cf_mitigated="challenge"))


@pytest.mark.parametrize("where", ["/post.json", "/image/2.png"])
@pytest.mark.parametrize("challenge", CHALLENGES)
def test_a_challenge_page_ends_the_run_at_once(make, go, tmp_path, challenge, where):
    board = make(post(1), post(2), post(3))
    board.always = {where: CHALLENGES[challenge]}
    code, _, said = go(board)
    assert code == 2 and "challenge" in one_error(said) and board.asked().count(where) == 1
    assert board.asked()[-1] == where and in_order(tmp_path / "out", [1] if "image" in where else [])


@pytest.mark.parametrize("where", ["/post.json", "/image/2.png"])
def test_a_board_that_bars_us_is_not_asked_again(make, go, tmp_path, where):
    board = make(post(1), post(2), post(3))
    board.always = {where: lambda h: h.send(403, b"error code: 1020", Content_Type="text/plain", Server="cloudflare")}
    code, _, said = go(board)
    assert code == 2 and "bars us (403, error code: 1020)" in one_error(said) and board.asked()[-1] == where
    assert board.asked().count(where) == 1 and in_order(tmp_path / "out", [1] if "image" in where else [])


def test_one_forbidden_picture_does_not_end_the_run(make, go, tmp_path):
    board = make(post(1), post(2), post(3))
    board.always = {"/image/2.png": lambda h: h.send(403, b"not this one", Content_Type="text/plain", Server="cloudflare")}
    assert go(board)[0] == 1 and in_order(tmp_path / "out", [1, 3])


def test_an_overloaded_server_is_no_challenge(make, go, tmp_path):
    board = make(post(1))
    board.once = {"/post.json": [lambda h: h.send(503, HTML, Content_Type="text/html")]}
    assert go(board)[0] == 0 and in_order(tmp_path / "out", [1])


@pytest.mark.parametrize("body", [b"", b"no", b'{"posts": 7}', b"7", b"null", b"[" * 100000, b'"\xff"', b"[{]"])
def test_a_search_that_is_no_list_of_posts(make, go, body):
    board = make(post(1))
    board.always = {"/post.json": lambda h: h.send(200, body)}
    code, _, said = go(board)
    assert code == 2 and "board?" in one_error(said) and len(board.log) == 1


def test_the_boards_own_reason_is_told(make, go):
    board = make(post(1))
    board.always = {"/posts.json": lambda h: h.send(422, json.dumps(dict(message="two tags \x1b[2J\nonly")).encode())}
    code, _, said = go(board, kind="danbooru")
    assert code == 2 and "422 two tags [2J only" in one_error(said)


# ---------------------------------------------------------------------------------------------------------------------
# Bodies
# ---------------------------------------------------------------------------------------------------------------------


def lost(board, go, out, tries=1):
    """Picture 2 fails after so many requests, 1 and 3 come, nothing of 2 stays; once mended it comes too."""
    code, _, said = go(board)
    assert code == 1 and re.search(r"failed: \S+-2-\S+\.png: ", said) and in_order(out, [1, 3]), said
    assert board.asked("/image").count("/image/2.png") == tries
    board.always.clear()
    assert go(board)[0] == 0 and in_order(out, [1, 2, 3])
    return said


def test_truncated_once(make, go, tmp_path):
    board = make(post(1))
    board.once = {"/image/1.png": [lambda h: h.send(200, picture(1)[:100], length=600)],
                  "/post.json": [lambda h: h.send(200, b'[{"id": 1', length=1000)]}
    code, _, said = go(board)
    assert code == 0 and in_order(tmp_path / "out", [1]) and "broke off after 100 of 600" in said


def test_nothing_of_a_first_try_stays_behind_a_shorter_second(make, go, tmp_path):
    board = make(post(1, file_size=None))
    board.once = {"/image/1.png": [lambda h: h.send(200, picture(1, 900), length=1000)]}
    assert go(board)[0] == 0 and in_order(tmp_path / "out", [1])


def chunked(h, *chunks, end=b"0\r\n\r\n"):
    body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + end
    h.send(200, body, length=False, Transfer_Encoding="chunked")


def test_chunked(make, go, tmp_path):
    board = make(post(1))
    board.once = {"/image/1.png": [lambda h: chunked(h, picture(1)[:100], end=b""), lambda h: chunked(
        h, picture(1)[:100], picture(1)[100:])]}
    assert go(board)[0] == 0 and in_order(tmp_path / "out", [1]) and len(board.asked("/image")) == 2


@pytest.mark.parametrize("odd, tries, why", [
    (lambda h: h.send(200, picture(2)[:100], length=600), scrape.TRIES, "broke off"),
    (lambda h: h.send(200, picture(2)[:100], length=False), 1, "100 bytes came where 600 are due"),
    (lambda h: h.send(200, picture(2), length=599), 1, "599 bytes came"),
    (lambda h: h.send(200, picture(2), length=601), 1, "longer than the 600"),
    (lambda h: h.send(200, picture(2), length=10 ** 15), 1, "longer than the 600"),
    (lambda h: h.send(200, picture(3)), 1, "md5"),
    (lambda h: h.send(200, b""), 1, "0 bytes"),
    (lambda h: h.send(404, b""), 1, "404"),
    (lambda h: h.send(206, picture(2)), 1, "206"),
    (lambda h: h.wfile.write(b"nonsense\r\n\r\n") and h.wfile.close(), scrape.TRIES, "nonsense"),
], ids="truncated short less more huge md5 empty 404 206 nonsense".split())
def test_wrong_bodies(make, go, tmp_path, odd, tries, why):
    board = make(post(1), post(2), post(3))
    board.always = {"/image/2.png": odd}
    assert why in lost(board, go, tmp_path / "out", tries)


def test_a_wrong_length_without_an_announced_size_is_found_by_md5(make, go, tmp_path):
    board = make(post(1), post(2, file_size=None), post(3))
    board.always = {"/image/2.png": lambda h: h.send(200, picture(2), length=599)}
    assert "md5" in lost(board, go, tmp_path / "out")


@pytest.mark.parametrize("announced", [600, None])
def test_endless_body(make, go, tmp_path, monkeypatch, announced):
    monkeypatch.setattr(scrape, "FILE_BYTES", 2 ** 20)
    sent = []

    def endless(h):
        sent.append(0)
        h.send(200, length=False)
        try:
            while sent[-1] < 2 ** 28:
                h.wfile.write(bytes(range(256)) * 256)
                sent[-1] += 2 ** 16
        except OSError:
            pass
    board = make(post(1), post(2, file_size=announced), post(3))
    board.always = {"/image/2.png": endless}
    assert "longer than the" in lost(board, go, tmp_path / "out") and len(sent) == 1
    monkeypatch.setattr(scrape, "PAGE_BYTES", 2 ** 20)
    board.always = {"/post.json": endless}
    code, _, said = go(board)
    assert code == 2 and "longer than the 1048576" in one_error(said)
    time.sleep(0.2)
    assert max(sent) < 2 ** 26          # the socket's buffers at most, not what was there


def test_a_body_that_drips(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "SLOWEST", 0.3)

    def drip(h):
        h.send(200, length=600)
        for n in range(600):
            h.wfile.write(picture(2)[n:n + 1])
            time.sleep(0.02)
    board = make(post(1), post(2), post(3))
    board.always = {"/image/2.png": drip}
    begun = time.monotonic()
    assert "not there after" in lost(board, go, tmp_path / "out") and time.monotonic() - begun < 6


def test_silence(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "SILENCE", 0.2)
    monkeypatch.setattr(scrape, "TRIES", 2)
    board = make(post(1), post(2), post(3))
    board.always = {"/image/2.png": lambda h: (h.send(200, length=600), time.sleep(1))}
    assert "timed out" in lost(board, go, tmp_path / "out", tries=2)


def test_too_large_is_not_begun(make, go, tmp_path):
    board = make(post(1, file_size=scrape.FILE_BYTES + 1), post(2))
    code, _, said = go(board)
    assert code == 0 and in_order(tmp_path / "out", [2]) and "1 over 512 MiB" in said


# ---------------------------------------------------------------------------------------------------------------------
# Where it goes
# ---------------------------------------------------------------------------------------------------------------------


def test_redirects_inside_the_board(make, go, tmp_path):
    board = make(post(1), post(2))
    board.always = {"/image/1.png": lambda h: h.send(301, Location="/elsewhere/a%20b.png?x=1"),
                    "/image/2.png": lambda h: h.send(302, Location="2.png")}
    board.files["/elsewhere/a b.png"] = picture(1)
    code, _, said = go(board)
    assert code == 1 and in_order(tmp_path / "out", [1]) and "redirected too often" in said
    assert len(board.asked("/image/2.png")) < 10


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1", "http://127.0.0.1:99999/",
                                    "gopher:x", "//", "http://localhost/x", "http://10.0.0.1/x", "OTHER"])
@pytest.mark.parametrize("by", ["redirect", "file_url"])
def test_no_other_scheme_and_no_other_private_address(make, go, tmp_path, target, by):
    other = make(post(2))
    target = f"{other.url}/image/2.png" if target == "OTHER" else target
    board = make(post(1), post(2), post(3))
    if target == "//" and by == "file_url":
        return          # the board itself
    if by == "redirect":
        board.always = {"/image/2.png": lambda h: h.send(302, Location=target)}
    else:
        board.posts[1]["file_url"] = target + "/x.png"
    code, _, said = go(board)
    assert in_order(tmp_path / "out", [1, 3]) and not other.log
    assert (code == 1 and re.search(r"failed: \S+-2-\S+\.png: re", said)) or (
        by == "file_url" and code == 0 and "1 without a file" in said)


def test_a_search_redirected_elsewhere_ends_the_run(make, go):
    board = make(post(1))
    board.always = {"/post.json": lambda h: h.send(302, Location="http://127.0.0.1:1/post.json")}
    code, _, said = go(board)
    assert code == 2 and "refused" in one_error(said) and len(board.log) == 1


def fake_names(monkeypatch, *addresses):
    def look_up(host, port, **_):
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
                for a in addresses]
    monkeypatch.setattr(scrape.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(scrape.socket, "create_connection", lambda *_: pytest.fail("connected"))


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.1.2.3"], ["192.168.0.1"], ["169.254.169.254"], ["0.0.0.0"],
                                       ["::1"], ["fe80::1%eth0"], ["fd00::1"], ["::ffff:127.0.0.1"], ["224.0.0.1"],
                                       ["8.8.8.8", "127.0.0.1"]])
@pytest.mark.parametrize("base, named", [("https://konachan.com", False), ("https://127.0.0.1:8443", True)])
def test_a_public_name_with_a_private_address(monkeypatch, addresses, base, named):
    fake_names(monkeypatch, *addresses)
    with pytest.raises(scrape.Failed, match="private"):
        scrape.Client(base, named, CONTACT, 1.0).connect("https://files.example/x.png")
    if not named:           # nor is the board's own name trusted, unless the user gave it
        with pytest.raises(scrape.Failed, match="private"):
            scrape.Client(base, named, CONTACT, 1.0).connect(f"{base}/post.json")


def test_the_named_port_alone_may_be_private(make):
    board, other = make(), make()
    client = scrape.Client(board.url, True, CONTACT, 1.0)
    client.connect(f"{board.url}/x")[0].close()
    for url in (other.url, board.url.replace("127.0.0.1", "localhost"), board.url.replace("127.0.0.1", "127.0.0.2")):
        with pytest.raises(scrape.Failed, match="private"):
            client.connect(f"{url}/x")


def test_a_fast_pause_is_for_the_board_itself(make, monkeypatch):
    board = make()
    fake_names(monkeypatch, "8.8.8.8")
    with pytest.raises(scrape.Failed, match="below 1 is for the board itself"):
        scrape.Client(board.url, True, CONTACT, 0.5).connect("https://files.example/x")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_https(make, go, tmp_path, monkeypatch):
    key, certificate, board = tmp_path / "key", tmp_path / "certificate", make(post(1), post(2))
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=board",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    board.server.socket = context.wrap_socket(board.server.socket, server_side=True)
    plain, board.url = board.url, board.url.replace("http:", "https:")
    code, _, said = go(board)
    assert code == 2 and "certificate is not valid" in one_error(said) and not board.log
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    board.always = {"/image/2.png": lambda h: h.send(302, Location=f"{plain}/image/1.png")}
    code, _, said = go(board)
    assert code == 1 and in_order(tmp_path / "out", [1]) and "no https address" in said


@pytest.mark.parametrize("url", ["http://files.example/x", "ftp://files.example/x", "file:///x", "files.example",
                                 "https:", "https://", "https://a:b/", "https://[1",
                                 "https://" + "a" * 300 + ".example/"])
def test_https_stays_https(monkeypatch, url):
    monkeypatch.setattr(scrape.socket, "create_connection", lambda *_: pytest.fail("connected"))
    if len(url) < 300:
        fake_names(monkeypatch, "8.8.8.8")
        if url in ("https:", "https://"):
            monkeypatch.setattr(scrape.socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up nothing"))
    with pytest.raises(scrape.Failed, match="refused"):
        scrape.Client("https://konachan.com", False, CONTACT, 1.0).connect(url)


# ---------------------------------------------------------------------------------------------------------------------
# Names, posts, pages
# ---------------------------------------------------------------------------------------------------------------------


def test_names_from_the_board_name_nothing_here(make, go, tmp_path):
    names = ["/image/../../../escaped.png", "/image/..%2f..%2fescaped.png", "/image/nul\0l.png", "/image/nul%00l.png",
             f"/image/{'x' * 300}.png", "/image/..\\..\\escaped.png", "/image/a b  c.png", "/image/\u58c1\u7d19.PNG",
             "/image/con.png", "/image/-rf.png", "/image/.png/x.png", "/image/\x1b[2J.png"]
    board = make(*(post(n, file_url=f"{name}?{n}") for n, name in enumerate(names, 1)))
    out = tmp_path / "deep" / "er" / "out"
    out.parent.mkdir(parents=True)
    code, _, said = go(board, out=out)
    assert code == 0 and in_order(out, range(1, len(names) + 1)), said
    assert all(re.fullmatch(r"127\.0\.0\.1-\d+-\d+-[0-9a-f]{8}\.png", r["file"]) for r in manifest(out))
    assert [p for p in tmp_path.rglob("*") if not p.is_relative_to(out)] == [out.parent.parent, out.parent]
    assert go(board, out=out)[0] == 0 and len(board.log) == len(names) + 4


def test_an_id_names_nothing_either(make, go, tmp_path):
    board = make(*(post(1) | dict(id=i) for i in ("../../escaped", None, -1, 0, 1.5, True, [1], {}, 10 ** 300, "2")),
                 post(3))
    board.files["/image/3.png"] = picture(3)
    code, _, said = go(board)
    assert code == 0 and in_order(tmp_path / "out", [3]) and "10 without a file" in said
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_posts_that_are_none(make, go, tmp_path):
    board = make(*map(post, range(1, 4)))
    for n, odd in enumerate([dict(file_url=None), dict(file_url=7), dict(file_url=""), dict(md5=None),
                             dict(md5="../x"), dict(file_url="http://[x/a.png"), dict(file_url="/\ud800.png"),
                             dict(file_url="/a" * 9000)]):
        board.posts.append(post(10 + n, **odd))
    del board.posts[3]["file_url"]
    board.posts += [None, 7, "x", [], {}, dict(id=99)]
    board.posts.append(post(50, tags=None, source=["x"], height="2160", file_size=-1, file_url="/image/1.png",
                            body=picture(1)))
    code, _, said = go(board)
    assert code == 0 and in_order(tmp_path / "out", [1, 2, 3]), said
    assert "8 without a file" in said


def test_text_from_the_board_is_one_clean_line(make, go, tmp_path):
    bad = 'a,"b"\r\n=1\x1b[2J\0\u2028\ud800 ' + "x" * 300000
    board = make(post(1, source=bad, tags=bad + " \u58c1\u7d19"), post(2, tags="\u58c1\u7d19"))
    assert go(board)[0] == 0 and in_order(tmp_path / "out", [1, 2])
    data = (tmp_path / "out" / "manifest.csv").read_bytes()
    assert data.count(b"\n") == 3 and b"\x1b" not in data and b"\0" not in data and b"\r" not in data
    first, second = manifest(tmp_path / "out")
    assert first["source"].startswith('a,"b" =1 [2J xxx') and second["tags"] == "\u58c1\u7d19"
    board.log.clear()
    assert go(board)[0] == 0 and not board.asked("/image")


def test_duplicated_ids_and_pictures(make, go, tmp_path):
    board = make(post(1), post(1), post(2), post(1), post(2))
    board.posts.append(post(7, body=picture(2)))            # the same picture under another number
    code, *_ = go(board)
    assert code == 0 and in_order(tmp_path / "out", [1, 2]) and len(board.asked("/image")) == 2
    other = make(post(1))                                   # and on another board
    assert go(other)[0] == 0 and not other.asked("/image") and in_order(tmp_path / "out", [1, 2])


def test_the_same_page_for_ever(make, go, tmp_path):
    board = make(*map(post, range(1, 4)))
    page = json.dumps(board.posts).encode()                 # and a bare list, as older boards send
    board.always = {"/post.json": lambda h: h.send(200, page)}
    assert go(board)[0] == 0 and in_order(tmp_path / "out", [1, 2, 3]) and len(board.asked("/post.json")) == 2


def test_pages_without_end(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "PAGES", 7)
    board, seen = make(), []

    def endless(h, **odd):
        seen.append(h.path)
        posts = [post(100 * len(seen) + n, **odd) for n in range(4)]
        board.files |= {p["file_url"]: picture(p["id"]) for p in posts}
        h.send(200, json.dumps(posts).encode())
    board.always = {"/post.json": endless}
    assert go(board, "--max", 10)[0] == 0 and len(seen) == 3
    assert in_order(tmp_path / "out", [100, 101, 102, 103, 200, 201, 202, 203, 300, 301])
    board.always = {"/post.json": lambda h: endless(h, rating="e")}
    assert go(board, "--max", 10)[0] == 0 and len(seen) == 3 + 7


# ---------------------------------------------------------------------------------------------------------------------
# What stays when it ends badly
# ---------------------------------------------------------------------------------------------------------------------


def start(board, out, *flags, preexec_fn=lambda: None, env=None):
    def first():    # a shell that starts the tests in the background makes them, and what they start, deaf to SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        preexec_fn()
    return subprocess.Popen([sys.executable, SCRIPT, "konachan", "--url", board.url, "--pause", "0.002", "-o", out,
                             "--contact", CONTACT, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=first, env=env)


@pytest.mark.parametrize("with_signal, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_in_the_middle_of_a_picture(make, go, tmp_path, with_signal, code):
    board, half, out = make(*map(post, range(1, 21))), threading.Event(), tmp_path / "out"

    def stall(h):
        h.send(200, picture(12)[:300], length=600)
        half.set()
        time.sleep(15)
    board.once = {"/image/12.png": [stall]}
    run = start(board, out)
    assert half.wait(15)
    time.sleep(0.3)
    run.send_signal(with_signal)
    _, said = run.communicate(timeout=10)
    assert run.returncode == code and "Traceback" not in said
    left = [p for p in out.iterdir() if p.suffix == ".part"]
    assert len(left) == (with_signal == signal.SIGKILL)
    if with_signal == signal.SIGINT:
        assert "stopped" in said and in_order(out, range(1, 12))
    assert {int(r["id"]) for r in manifest(out)} == set(range(1, 12))
    assert go(board)[0] == 0 and in_order(out, range(1, 21))
    assert sorted(board.asked("/image")) == sorted([f"/image/{n}.png" for n in range(1, 21)] + ["/image/12.png"])


def test_killed_anywhere(make, go, tmp_path):
    """Killed again and again, wherever it is: nothing is asked for twice but what was under way."""
    board, out, runs = make(*map(post, range(1, 61))), tmp_path / "out", 0
    for wanted in (5, 18, 33, 47):
        run = start(board, out)
        end = time.monotonic() + 60
        while len(set(board.asked("/image"))) < wanted and time.monotonic() < end:
            time.sleep(0.0007)
        run.kill()
        run.communicate()
        runs += 1
        for p in out.glob("*.png"):
            assert hashlib.md5(p.read_bytes()).hexdigest()[:8] == p.stem[-8:]
        rows = manifest(out)
        assert len({r["id"] for r in rows}) == len(rows) and wanted - 3 <= len(rows) < 60
    assert go(board)[0] == 0 and in_order(out, range(1, 61))
    assert len(board.asked("/image")) <= 60 + runs


@pytest.mark.parametrize("cut", [1, 40, 10 ** 6])
def test_a_torn_manifest_is_mended_without_asking_again(make, go, tmp_path, cut):
    board, path = make(*map(post, range(1, 6))), tmp_path / "out" / "manifest.csv"
    assert go(board)[0] == 0
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[:max(len(whole) - cut, last if cut < 10 ** 6 else 0)])  # no end; half a row; all of it
    board.log.clear()
    assert go(board)[0] == 0 and in_order(tmp_path / "out", range(1, 6))
    assert path.read_bytes() == whole and not board.asked("/image")


def test_a_last_row_without_its_line_end_is_one_if_its_picture_is_there(make, go, tmp_path):
    """Some editors leave it out; a trial run changes nothing."""
    board, path = make(*map(post, range(1, 3))), tmp_path / "out" / "manifest.csv"
    go(board)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "2 of 2 pictures are here" in go(board, "--dry-run")[2] and path.read_bytes() == whole[:-1]
    path.write_bytes(whole[:-3])
    assert "1 of 2 pictures are here" in go(board, "--dry-run")[2] and path.read_bytes() == whole[:-3]
    board.posts.pop()           # so that nothing is written after it
    path.write_bytes(whole[:-1])
    assert go(board)[0] == 0 and path.read_bytes() == whole


def test_two_runs_at_once_do_not_ask_twice_as_fast(make, go, tmp_path):
    pytest.importorskip("fcntl")
    board, out = make(post(1)), tmp_path / "out"
    out.mkdir()
    lock = out / f".127.0.0.1-{board.server.server_port}.lock"
    holding = "import sys, scrape, pathlib\nwith scrape.alone(pathlib.Path(sys.argv[1]), 'it'):\n print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", holding, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=Path(scrape.__file__).parent)
    other.stdout.readline()
    code, _, said = go(board)
    assert code == 2 and "by another process" in one_error(said) and not board.log
    other.kill()                # its lock goes with it, the file stays
    other.wait()
    assert lock.exists() and go(board)[0] == 0 and in_order(out, [1])


@pytest.mark.parametrize("status", (404, 421))
def test_a_boards_own_reason_is_shown(make, go, status):
    board = make(post(1))
    board.once = {"/post.json": [lambda h: h.send(status, b'{"success": false, "reason": "Daily limit exceeded"}')]}
    assert "Daily limit exceeded" in go(board)[2]


def test_a_picture_that_was_removed_comes_again_and_an_edited_one_stays(make, go, tmp_path):
    board, out = make(*map(post, range(1, 6))), tmp_path / "out"
    go(board)
    before, names = (out / "manifest.csv").read_bytes(), {r["id"]: r["file"] for r in manifest(out)}
    (out / names["2"]).unlink()
    (out / names["4"]).write_bytes(b"cropped by hand")
    board.log.clear()
    code, _, said = go(board)
    assert code == 0 and (out / "manifest.csv").read_bytes() == before and f"stay so, as {names['4']}" in said
    assert board.asked("/image") == ["/image/2.png"] and (out / names["4"]).read_bytes() == b"cropped by hand"
    (out / "manifest.csv").unlink()
    code, _, said = go(board)
    assert code == 1 and f"failed: {names['4']}: what stands there" in said and len(board.asked("/image")) == 1
    assert (out / names["4"]).read_bytes() == b"cropped by hand"
    (out / names["4"]).unlink()
    assert go(board)[0] == 0 and in_order(out, range(1, 6))


def test_a_picture_that_the_board_replaced_is_another_file(make, go, tmp_path):
    board, out = make(post(1)), tmp_path / "out"
    go(board)
    board.posts[0] = post(1, body=picture(1, 700))
    board.files["/image/1.png"] = picture(1, 700)
    assert go(board)[0] == 0 and in_order(out) and [r["size"] for r in manifest(out)] == ["600", "700"]


def test_what_a_killed_run_left_goes_and_nothing_else(make, go, tmp_path):
    board, out = make(post(1)), tmp_path / "out"
    out.mkdir()
    for name in (f"127.0.0.1-{board.server.server_port}-99-01234567.png.part", "mine.part", "mine.png"):
        (out / name).write_text("half")
    assert go(board)[0] == 0
    assert {p.name for p in out.iterdir()} == {"mine.part", "mine.png", "manifest.csv", manifest(out)[0]["file"]}


def test_two_boards_share_a_folder(make, go, tmp_path):
    board, other = make(post(1), post(2)), make(post(3), post(4))
    go(board)
    assert go(other)[0] == 0 and in_order(tmp_path / "out", [1, 2, 3, 4])
    assert len({r["board"] for r in manifest(tmp_path / "out")}) == 2


def test_full_disk_in_a_picture(make, go, tmp_path):
    board, out = make(post(1), post(2, body=picture(2, 300000)), post(3)), tmp_path / "out"
    board.files["/image/2.png"] = picture(2, 300000)
    limit = 100000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    run = start(board, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, said = run.communicate(timeout=15)
    assert run.returncode == 2 and "File too large" in one_error(said) and in_order(out, [1])
    board.log.clear()
    assert go(board)[0] == 0 and in_order(out, [1, 2, 3]) and "/image/1.png" not in board.asked()


def test_full_disk_in_the_manifest(make, go, tmp_path):
    posts = [post(n, tags="t" * 3000) for n in range(1, 9)]
    board, out = make(*posts), tmp_path / "out"
    limit = 10000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    run = start(board, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, said = run.communicate(timeout=15)
    assert run.returncode == 2 and "File too large" in one_error(said)
    assert {r["id"] for r in manifest(out)} == {"1", "2", "3"} and (out / "manifest.csv").read_bytes()[-1:] == b"\n"
    board.log.clear()
    assert go(board)[0] == 0 and in_order(out, range(1, 9))
    assert sorted(board.asked("/image")) == [f"/image/{n}.png" for n in range(5, 9)]    # 4 was there, without its row


@pytest.mark.parametrize("what", ["file", "below a file", "read-only manifest"])
def test_a_folder_that_cannot_be_written(make, go, tmp_path, what):
    board, out = make(post(1)), tmp_path / "out"
    if what == "read-only manifest":
        (out / "manifest.csv").mkdir(parents=True)
    else:
        out.write_text("mine")
    code, _, said = go(board, out=out / "deeper" if what == "below a file" else out)
    assert code == 2 and one_error(said) and not board.log
    assert what == "read-only manifest" or out.read_text() == "mine"


def test_anothers_manifest_is_left_alone(make, go, tmp_path):
    board, out = make(post(1)), tmp_path / "out"
    out.mkdir()
    for theirs in ("name;size\nx.png;7\n", '"half', "\xff\xfe\n", "\n"):
        (out / "manifest.csv").write_bytes(theirs.encode("latin-1"))
        code, _, said = go(board)
        assert code == 2 and "choose another folder" in one_error(said) and not board.log
        assert (out / "manifest.csv").read_bytes() == theirs.encode("latin-1")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, word", [
    (["--pause", "0.5"], "--pause"), (["--pause", "nan"], "--pause"), (["--pause", "-1"], "--pause"),
    (["--pause", "0.9", "--url", "http://192.168.1.7"], "--pause"),
    (["--pause", "0", "--url", "https://a.b"], "--pause"),
    (["--max", "0"], "--max"), (["--min-width", "-1"], "--min-width"), (["--rating", "x"], "--rating"),
    (["--rating", ""], "--rating"), (["--url", "localhost:3000"], "--url"), (["--url", "file:///x"], "--url"),
    (["--url", "http://[::1"], "--url"), (["--url", "http://"], "--url"), (["--url", "http://a:99999"], "--url"),
    (["--url", "https://me:secret@a.b"], "--url"),
    (["--contact", "nobody"], "--contact"),
    (["--contact", "a@b.c\r\nX: y"], "--contact"), (["--opt-out", "missing"], "missing"), (["--opt-out", "."], "read"),
    (["--contact", "\u58c1@b.c"], "--contact")])
def test_mistakes(monkeypatch, capsys, tmp_path, flags, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scrape.socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.setattr(sys, "argv", ["scrape.py", "konachan", "-o", "out", "--contact", CONTACT, *flags])
    with pytest.raises(SystemExit) as end:
        scrape.main()
    assert end.value.code == 2 and word in one_error(capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_contact_and_out_are_required(monkeypatch, capsys):
    for flags in (["-o", "x"], ["--contact", CONTACT]):
        monkeypatch.setattr(sys, "argv", ["scrape.py", "konachan", *flags])
        with pytest.raises(SystemExit) as end:
            scrape.main()
        assert end.value.code == 2 and "required" in capsys.readouterr().err


def test_progress_tells_the_time_left(make, go, monkeypatch):
    monkeypatch.setattr(sys.stderr.__class__, "isatty", lambda _: True)
    said = go(make(*map(post, range(1, 6))))[2]
    assert "4/5" in said and re.search(r"\d\.\d\d MB/s  0:0\d left", said) and "page 1: 5 posts, 5 wanted" in said


def test_help_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "scrape.py").write_bytes(SCRIPT.read_bytes())
    done = subprocess.run([sys.executable, "-I", "scrape.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "example:" in done.stdout and "artists" in done.stdout
    code = "import sys, scrape; sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": ""}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env).returncode == 0


def test_only_silence_in_a_row_means_that_the_board_is_down(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "TRIES", 1)
    board = make(*map(post, range(1, 9)))
    board.always = {f"/image/{n}.png": lambda h, n=n: h.send(404 if n == 3 else 500) for n in (1, 2, 3, 4, 6, 7)}
    code, told, _ = go(board)
    assert code == 1 and "6 failed" in told and in_order(tmp_path / "out", [5, 8])


def test_a_manifest_and_a_list_that_an_editor_saved(make, go, tmp_path):
    board, path = make(post(1), post(2)), tmp_path / "out" / "manifest.csv"
    (tmp_path / "leave").write_bytes("\ufeffsomeone\r\n".encode())
    assert go(board, "--opt-out", tmp_path / "leave")[0] == 0 and not board.asked("/image")
    go(board)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    board.log.clear()
    assert go(board)[0] == 0 and not board.asked("/image")


def test_the_next_address_of_a_name_is_tried(make, monkeypatch):
    board, look_up = make(), socket.getaddrinfo
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (1, board.server.server_port)]
    monkeypatch.setattr(scrape.socket, "getaddrinfo", lambda *a, **how: places if how else look_up(*a))
    scrape.Client(board.url, True, CONTACT, 1.0).connect(f"{board.url}/x")[0].close()


def test_a_full_disk_is_found_before_the_board_is_asked(make, tmp_path):
    board, limit = make(post(1)), (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    run = start(board, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2 and "File too large" in one_error(said) and not board.log


def test_the_back_off_has_an_end_and_holds_for_the_next_picture(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "PATIENCE", 0.3)
    board = make(post(1), post(2))
    board.always = {"/image/1.png": lambda h: h.send(500)}
    code, _, said = go(board, pause=0.05)
    t = board.times()
    assert code == 1 and in_order(tmp_path / "out", [2]) and said.count("waiting 0.3 s") == 3
    assert t[-1] - t[-2] >= 0.3


def test_ctrl_c_in_the_manifest_leaves_it_as_it_was(tmp_path, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt
    scrape.add_row(tmp_path / "a", dict.fromkeys(scrape.COLUMNS, "x"))
    before = (tmp_path / "a").read_bytes()
    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        scrape.add_row(tmp_path / "a", dict.fromkeys(scrape.COLUMNS, "y"))
    assert (tmp_path / "a").read_bytes() == before


def test_an_answer_in_ascii(make, tmp_path):
    run = start(make(post(1)), tmp_path / "\u58c1\u7d19", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    told, said = run.communicate(timeout=60)
    assert run.returncode == 0 and r"\u58c1\u7d19" in told and "Traceback" not in said
