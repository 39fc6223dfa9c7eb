"""scrape.py: against a local test server (loopback only). Time is simulated: no test sleeps."""
import csv
import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import scrape

CONTACT = "me@example.org"
HTML = b"<!DOCTYPE html><title>Just a moment...</title>"


def picture(number, size=600):
    """Return bytes that differ for each number. scrape.py does not decode pictures."""
    return (b"\x89PNG\r\n\x1a\n" + hashlib.sha256(str(number).encode()).digest() * (size // 32 + 1))[:size]


def post(number, body=None, **changes):
    """Return a Moebooru post that passes all filters."""
    body = picture(number) if body is None else body
    fields = dict(id=number, tags="landscape sky someone", md5=hashlib.md5(body).hexdigest(), file_size=len(body),
                  file_url=f"/image/{number}.png", width=3840, height=2160, rating="s", parent_id=None,
                  has_children=False, source=f"https://art.example/{number}")
    return {**fields, **changes}


def danbooru_post(number, rating="g", **changes):
    """Return a Danbooru post that passes all filters."""
    fields = post(number, rating=rating, tag_string="landscape sky someone", tag_string_artist="someone",
                  image_width=3840, image_height=2160)
    fields = {key: value for key, value in fields.items() if key not in ("tags", "width", "height")}
    return {**fields, **changes}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:     # the client closed the connection
            pass

    def send(self, status, body=b"", length=True, **headers):
        """Send a response. length: False omits the Content-Length header, a number replaces it."""
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
        board.log.append((board.now(), self.path, dict(self.headers)))
        special = board.once[path].pop(0) if board.once.get(path) else board.always.get(path)
        if special:
            special(self)
        elif path in ("/post.json", "/posts.json"):
            found = board.search({k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()})
            self.send(200, json.dumps(found).encode(), Content_Type="application/json")
        elif urlsplit(self.path).query.isdigit():
            self.send(200, picture(int(urlsplit(self.path).query)))
        elif path in board.files:
            self.send(200, board.files[path], Content_Type="image/png")
        else:
            self.send(404, HTML, Content_Type="text/html")


class Board:
    """A test server with these posts, newest first; the file of a post is picture(id).

    once: path -> list of special responses, each sent once. always: path -> special response.
    """

    def __init__(self, posts, now):
        self.posts, self.now, self.log, self.once, self.always = list(posts), now, [], {}, {}
        self.types = {"someone": "artist", "sky": "general"}
        self.files = {urlsplit(p["file_url"]).path: picture(p["id"]) for p in posts if p.get("file_url")}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.board, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def search(self, query):
        """Answer like the boards: Danbooru understands page=b<ID>, Moebooru the tag id:<N."""
        match = re.fullmatch(r"b(\d+)", query["page"]) or re.search(r"(?:^| )id:<(\d+)", query["tags"])
        posts = [p for p in self.posts if not match or p["id"] < int(match[1])]
        limit = int(query["limit"])
        first = 0 if query["page"].startswith("b") else (int(query["page"]) - 1) * limit
        posts = posts[first:first + limit]
        return dict(posts=posts, tags=self.types) if query.get("api_version") == "2" else posts

    def paths(self, prefix="/"):
        """Return the requested paths, without their queries."""
        return [unquote(urlsplit(path).path) for _, path, _ in self.log if path.startswith(prefix)]

    def queries(self):
        """Return the queries of the searches."""
        queries = [urlsplit(path).query for _, path, _ in self.log if path.startswith("/post")]
        return [{key: value[0] for key, value in parse_qs(query).items()} for query in queries]

    def times(self):
        return [seconds for seconds, *_ in self.log]


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock of scrape.py by one that only sleep() moves. `clock[0]` is the time in seconds."""
    now = [1000.0]

    def sleep(seconds):
        now[0] += seconds
    monkeypatch.setattr(scrape, "monotonic", lambda: now[0])
    monkeypatch.setattr(scrape, "sleep", sleep)
    monkeypatch.setenv("no_proxy", "*")
    return now


@pytest.fixture
def make(clock):
    """make(post, ...) -> Board"""
    boards = []

    def board(*posts):
        boards.append(Board(posts, lambda: clock[0]))
        return boards[-1]
    yield board
    for b in boards:
        b.server.shutdown()
        b.server.server_close()


@pytest.fixture
def go(clock, monkeypatch, capsys, tmp_path):
    """go(board, flag, ...) -> (exit code, stdout, stderr) of main(), which downloads into tmp_path/out."""
    def run(board, *flags, kind="konachan", out=tmp_path / "out"):
        monkeypatch.setattr(sys, "argv", ["scrape.py", kind, "--url", board.url, "-o", str(out),
                                          "--contact", CONTACT, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            scrape.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return end.value.code, printed.out, printed.err
    return run


def manifest(out):
    with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def check_folder(out, ids):
    """Assert that the folder holds the manifest, exactly the pictures `ids`, each complete, and no other file."""
    rows = manifest(out)
    assert sorted(int(row["id"]) for row in rows) == sorted(ids)
    assert {p.name for p in out.iterdir()} == {row["file"] for row in rows} | {"manifest.csv"}
    for row in rows:
        body = (out / row["file"]).read_bytes()
        assert body == picture(int(row["id"]), len(body)) and hashlib.md5(body).hexdigest() == row["md5"]
        assert str(len(body)) == row["size"]


# ------------------------------------------------------------------------------------------------------------
# A board that works
# ------------------------------------------------------------------------------------------------------------


def test_300_posts_are_filtered_and_a_second_run_downloads_nothing(make, go, tmp_path):
    changes = [dict(rating="q"), dict(rating="e"), dict(width=3839), dict(parent_id=7), dict(has_children=True),
               dict(tags="landscape Left_Out"), dict(file_url="/image/film.mp4"), dict(file_url=None), dict(md5="0")]
    board = make(*(post(n, **(changes[n // 3 % len(changes)] if n % 3 == 0 else {})) for n in range(300, 0, -1)))
    (tmp_path / "list").write_text("\ufeffnobody_here\nleft out\n\n", "utf-8")
    flags = ["--tags", "landscape -chibi", "--max", 1000, "--opt-out", tmp_path / "list"]
    code, printed, _ = go(board, *flags)
    assert code == 0
    check_folder(tmp_path / "out", [n for n in range(1, 301) if n % 3])
    assert all(text in printed for text in ("200 pictures", "56 posts skipped: unread", "22 posts skipped: variant", "11 posts skipped: opted", "11 posts skipped: not a pic"))
    assert sorted(board.paths("/image")) == sorted(f"/image/{n}.png" for n in range(1, 301) if n % 3)
    assert set(board.queries()[0]["tags"].split()) == {"landscape", "-chibi", "rating:s", "width:>=3840"}
    assert all(CONTACT in headers["User-Agent"] for *_, headers in board.log)
    name, md5 = "127.0.0.1", board.posts[-1]["md5"]
    assert manifest(tmp_path / "out")[-1] == dict(
        id="1", board=name, page=f"{board.url}/post/show/1", url=f"{board.url}/image/1.png", md5=md5, size="600",
        width="3840", height="2160", rating="safe", tags="landscape sky someone", artists="someone",
        source="https://art.example/1", licence="", file=f"{name}-1-{md5[:8]}.png")

    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    board.log.clear()
    assert go(board, *flags)[0] == 0 and set(board.paths()) == {"/post.json"}
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("rating, tag, letters", [("s", "rating:g", "g"), ("q", "rating:s,q", "sq"),
                                                  ("e", "rating:e", "e")])
def test_danbooru_ratings(make, go, tmp_path, rating, tag, letters):
    board = make(*(danbooru_post(n, letter) for n, letter in enumerate(letters, 1)),
                 danbooru_post(6, letters[0], is_banned=True))
    assert go(board, "--rating", rating, "--tags", "landscape sky", kind="danbooru")[0] == 0
    assert set(board.queries()[0]["tags"].split()) == {"landscape", "sky", "width:>=3840", tag}
    words = dict(g="general", s="sensitive", q="questionable", e="explicit")
    rows = manifest(tmp_path / "out")
    assert [row["rating"] for row in rows] == [words[letter] for letter in letters]
    assert rows[0]["artists"] == "someone" and rows[0]["page"] == f"{board.url}/posts/1"


def test_moebooru_ratings(make, go, tmp_path):
    board = make(post(1, rating="q"))
    assert go(board, "--rating", "q", "--min-width", 0)[0] == 0
    assert board.queries()[0]["tags"] == "rating:q"
    assert [row["rating"] for row in manifest(tmp_path / "out")] == ["questionable"]


def test_width_and_max(make, go, tmp_path):
    board = make(post(1, width=99), post(2, width=100), post(3), post(4))
    assert go(board, "--min-width", 100, "--max", 2)[0] == 0
    check_folder(tmp_path / "out", [2, 3])


def test_at_most_one_request_a_second_redirects_included(make, go):
    board = make(post(2), post(1))
    board.once["/image/2.png"] = [lambda h: h.send(302, Location="/moved.png?2")]
    assert go(board, "--max", 2)[0] == 0
    times = board.times()
    assert len(times) == 4      # search, redirect, picture, picture
    assert all(after - before >= 1 for before, after in zip(times, times[1:])), times


# ------------------------------------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, make_post", [("konachan", post), ("danbooru", danbooru_post)])
def test_pages_are_requested_by_id(make, go, tmp_path, monkeypatch, kind, make_post):
    """Uploads during the search shift numbered pages: page 2 would have nothing new."""
    monkeypatch.setattr(scrape, "POSTS_PER_PAGE", 4)
    board = make(*(make_post(n) for n in range(10, 0, -1)))

    def upload(h):
        board.posts[:0] = [make_post(n) for n in range(14, 10, -1)]
        h.send(200, picture(10))
    board.once["/image/10.png"] = [upload]
    assert go(board, kind=kind)[0] == 0
    check_folder(tmp_path / "out", range(1, 11))
    if kind == "danbooru":
        assert [query["page"] for query in board.queries()] == ["1", "b7", "b3", "b1"]
    else:
        tags = [query["tags"].split()[-1] for query in board.queries()]
        assert tags[1:] == ["id:<7", "id:<3", "id:<1"] and {query["page"] for query in board.queries()} == {"1"}


def test_an_ordered_search_is_requested_by_number(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "POSTS_PER_PAGE", 3)
    ids = [5, 9, 1, 5, 8, 1, 7, 2]
    board = make(*map(post, ids))
    assert go(board, "--tags", "order:score")[0] == 0
    check_folder(tmp_path / "out", set(ids))
    assert [query["page"] for query in board.queries()] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("failure", [lambda h: h.send(500, b'{"success": false, "message": "search timed out"}'),
                                     lambda h: h.send(403, b"search timed out"),
                                     lambda h: h.send(200, b'{"success": false, "reason": "search timed out"}'),
                                     lambda h: h.send(200, b'["search timed out"]')],
                         ids=["500", "403", "message", "list"])
def test_a_failed_deep_page_keeps_the_pictures_of_earlier_pages(make, go, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(scrape, "POSTS_PER_PAGE", 3)
    board = make(*map(post, range(9, 0, -1)))

    def fail_from_now(h):
        board.always["/post.json"] = failure
        h.send(200, picture(4))
    board.once["/image/4.png"] = [fail_from_now]
    code, _, printed = go(board)
    assert code == 2 and "search timed out" in printed.splitlines()[-1]
    check_folder(tmp_path / "out", range(4, 10))
    board.always.clear()
    assert go(board)[0] == 0
    check_folder(tmp_path / "out", range(1, 10))


def test_a_board_that_repeats_one_page_is_noticed(make, go, tmp_path):
    board = make(*map(post, range(3, 0, -1)))
    page = json.dumps(board.posts).encode()
    board.always["/post.json"] = lambda h: h.send(200, page)
    assert go(board)[0] == 2 and len(board.queries()) == 2
    check_folder(tmp_path / "out", [1, 2, 3])


def rename(old, new):
    return lambda fields: {new if key == old else key: value for key, value in fields.items()}


@pytest.mark.parametrize("change, expected", [
    (rename("file_url", "original_url"), "original_url"),
    (rename("md5", "hash"), "hash"),
    (rename("id", "post_id"), "post_id"),
    (rename("tags", "tag_list"), "tag_list"),
    (rename("rating", "age_rating"), "age_rating"),
    (rename("width", "original_width"), "original_width"),
    (lambda fields: {**fields, "rating": "safe"}, "'safe'"),
    (lambda fields: {**fields, "rating": "e"}, "rating 'e'"),             # not requested
    (lambda fields: {**fields, "width": "3840"}, '"3840"'),
    (lambda fields: {**fields, "md5": "sha256:0"}, "'sha256:0'"),
    (lambda fields: "We moved to API v3", "We moved to API v3")])
@pytest.mark.parametrize("first_page", [True, False])
def test_changed_posts_are_noticed_within_one_page(make, go, monkeypatch, change, expected, first_page):
    monkeypatch.setattr(scrape, "POSTS_PER_PAGE", 3)
    posts = [post(n) for n in range(30, 0, -1)]
    board = make(*posts)

    def answer(h):
        number = len(board.queries())
        page = posts[3 * number - 3:3 * number]
        if first_page or number > 1:
            page = [change(p) for p in page]
        h.send(200, json.dumps(page).encode())
    board.always["/post.json"] = answer
    code, _, printed = go(board)
    assert code == 2 and expected in printed.splitlines()[-1]
    assert len(board.queries()) == (1 if first_page else 2)


@pytest.mark.parametrize("body, expected", [
    (b"", ""), (b"search is down", "search is down"), (b"7", "7"), (b'{"posts": 7}', "posts"),
    (b'{"items": [{"id": 1}]}', "items"), (b'{"posts": [], "success": false, "reason": "API closed"}', "API closed")])
def test_a_message_instead_of_posts_is_shown(make, go, body, expected):
    board = make(post(1))
    board.always["/post.json"] = lambda h: h.send(200, body)
    code, _, printed = go(board)
    assert code == 2 and expected in printed.splitlines()[-1] and len(board.log) == 1


def test_the_message_of_an_error_is_one_printable_line(make, go):
    board = make(post(1))
    message = json.dumps(dict(message="two tags \x1b[2J\nonly")).encode()
    board.always["/posts.json"] = lambda h: h.send(422, message)
    code, _, printed = go(board, kind="danbooru")
    assert code == 2 and "two tags" in printed.splitlines()[-1] and "422" in printed and "\x1b" not in printed


def test_some_unreadable_posts_are_skipped_and_counted(make, go, tmp_path):
    changes = [dict(file_url=7), dict(md5="../x"), dict(id="../../x"),
               dict(id=True), dict(height="2160"), dict(rating=["s"])]
    board = make(post(3), post(2), post(1))
    board.posts += [post(10 + n, **change) for n, change in enumerate(changes)] + [None, "x", {}]
    board.search = lambda query: [] if "id:<" in query["tags"] else board.posts
    code, printed, _ = go(board)
    assert code == 0 and "9 posts skipped: unreadable" in printed
    check_folder(tmp_path / "out", [1, 2, 3])


def test_unreadable_posts_at_the_end_of_a_page_are_requested_once(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "POSTS_PER_PAGE", 4)
    board = make(*(post(n, **({"md5": "../x"} if n in (3, 7) else {})) for n in range(10, 0, -1)))
    code, printed, _ = go(board)
    assert code == 0 and "2 posts skipped: unreadable" in printed
    check_folder(tmp_path / "out", [1, 2, 4, 5, 6, 8, 9, 10])


# ------------------------------------------------------------------------------------------------------------
# Errors and waits
# ------------------------------------------------------------------------------------------------------------


def test_retry_after_is_honored(make, go, tmp_path):
    board = make(post(1))
    board.once = {"/post.json": [lambda h: h.send(429, Retry_After="50")],
                  "/image/1.png": [lambda h: h.send(503, b"{}", Retry_After="soon")]}
    assert go(board, "--max", 1)[0] == 0
    times = board.times()
    assert times[1] - times[0] >= 50 and times[3] - times[2] >= 2
    check_folder(tmp_path / "out", [1])


def test_a_very_long_retry_after_ends_the_run(make, go):
    board = make(post(1))
    board.always["/post.json"] = lambda h: h.send(503, Retry_After="86400")
    assert go(board)[0] == 2 and len(board.log) == 1


def test_waits_double(make, go):
    board = make(post(1))
    board.once["/image/1.png"] = [lambda h, s=s: h.send(s, HTML) for s in (500, 429, 502, 421, 503)]
    assert go(board, "--max", 1)[0] == 0
    times = board.times()[1:]
    assert [round(after - before) for before, after in zip(times, times[1:])] == [2, 4, 8, 16, 32]


def test_repeated_429_ends_the_run(make, go, tmp_path):
    board = make(post(3), post(2), post(1))
    board.always["/image/2.png"] = lambda h: h.send(429, b'{"reason": "Daily limit"}')
    code, _, printed = go(board)
    assert code == 2 and "Daily limit" in printed.splitlines()[-1]
    assert board.paths("/image") == ["/image/3.png"] + ["/image/2.png"] * scrape.MAX_TRIES
    check_folder(tmp_path / "out", [3])


def test_failed_pictures_end_the_run_only_in_a_row(make, go, tmp_path):
    board = make(*map(post, range(12, 0, -1)))
    for number in (12, 11, 10, 9, 7, 6, 5, 4):
        board.always[f"/image/{number}.png"] = lambda h: h.send(404)
    code, printed, _ = go(board)
    assert code == 1 and "8 failed" in printed
    check_folder(tmp_path / "out", [1, 2, 3, 8])
    board = make(*map(post, range(20, 13, -1)))
    board.files.clear()
    assert go(board)[0] == 2 and len(board.paths("/image")) == scrape.MAX_FAILURES


def test_no_connection_ends_the_run(make, go):
    board = make(post(1))
    board.server.shutdown()
    board.server.server_close()
    code, _, printed = go(board)
    assert code == 2 and printed.splitlines()[-1].startswith("error: ")


CHALLENGES = dict(html=lambda h: h.send(200, b"\n  " + HTML, Content_Type="text/html"),
                  forbidden=lambda h: h.send(403, HTML),
                  mitigated=lambda h: h.send(403, b"{}", cf_mitigated="challenge"))


@pytest.mark.parametrize("path", ["/post.json", "/image/2.png"])
@pytest.mark.parametrize("challenge", CHALLENGES)
def test_a_challenge_page_ends_the_run_at_once(make, go, tmp_path, challenge, path):
    board = make(post(3), post(2), post(1))
    board.always = {path: CHALLENGES[challenge]}
    code, _, printed = go(board)
    assert code == 2 and printed.splitlines()[-1].startswith("error: ")
    assert board.paths().count(path) == 1 and board.paths()[-1] == path
    check_folder(tmp_path / "out", [3] if "image" in path else [])


def test_an_overloaded_server_is_not_a_challenge(make, go, tmp_path):
    board = make(post(1))
    board.once["/post.json"] = [lambda h: h.send(503, HTML, Content_Type="text/html")]
    assert go(board)[0] == 0
    check_folder(tmp_path / "out", [1])


def chunked(h, *chunks, end=b"0\r\n\r\n"):
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end
    h.send(200, body, length=False, Transfer_Encoding="chunked")


def test_an_incomplete_response_is_requested_again(make, go, tmp_path):
    board = make(post(1))
    board.once = {"/post.json": [lambda h: h.send(200, b'[{"id": 1', length=1000)],
                  "/image/1.png": [lambda h: h.send(200, picture(1)[:100], length=600),
                                   lambda h: chunked(h, picture(1)[:100], end=b""),
                                   lambda h: chunked(h, picture(1)[:100], picture(1)[100:])]}
    assert go(board)[0] == 0 and len(board.paths("/image")) == 3
    check_folder(tmp_path / "out", [1])


@pytest.mark.parametrize("response, tries", [
    (lambda h: h.send(200, picture(2)[:100], length=600), scrape.MAX_TRIES),    # incomplete in each try
    (lambda h: h.send(200, picture(2)[:100], length=False), 1),
    (lambda h: h.send(200, picture(2), length=599), 1),
    (lambda h: h.send(200, picture(2) + b"x"), 1),
    (lambda h: h.send(200, picture(3)), 1),                                     # wrong md5
    (lambda h: h.send(200, b""), 1),
    (lambda h: h.send(404, HTML), 1),
    (lambda h: h.send(403, b"not this one", Content_Type="text/plain"), 1),
    (lambda h: (h.wfile.write(b"nonsense\r\n\r\n"), setattr(h, "close_connection", True)), scrape.MAX_TRIES),
], ids="incomplete short less more md5 empty 404 403 nonsense".split())
def test_a_failed_picture_is_named_and_comes_with_the_next_run(make, go, tmp_path, response, tries):
    board = make(post(3), post(2), post(1))
    board.always["/image/2.png"] = response
    code, printed, lines = go(board)
    assert code == 1 and "1 failed" in printed and re.search(r"failed: \S+-2-\S+\.png: ", lines)
    assert board.paths("/image").count("/image/2.png") == tries
    check_folder(tmp_path / "out", [1, 3])
    board.always.clear()
    assert go(board)[0] == 0
    check_folder(tmp_path / "out", [1, 2, 3])


def test_a_silent_server_times_out(make, go, tmp_path, monkeypatch):
    monkeypatch.setattr(scrape, "TIMEOUT", 0.1)
    monkeypatch.setattr(scrape, "MAX_TRIES", 2)
    board, done = make(post(2), post(1)), threading.Event()
    board.always["/image/1.png"] = lambda h: (h.send(200, length=600), done.wait(10))
    code = go(board)[0]
    done.set()
    assert code == 1 and board.paths("/image").count("/image/1.png") == 2
    check_folder(tmp_path / "out", [2])


# ------------------------------------------------------------------------------------------------------------
# Addresses, names and texts from the board
# ------------------------------------------------------------------------------------------------------------


def test_redirects(make, go, tmp_path):
    board = make(post(2), post(1))
    board.always = {"/image/1.png": lambda h: h.send(301, Location="/other/a%20b.png?x=1"),
                    "/image/2.png": lambda h: h.send(302, Location="2.png")}     # a loop
    board.files["/other/a b.png"] = picture(1)
    assert go(board)[0] == 1 and len(board.paths("/image/2.png")) <= 10
    check_folder(tmp_path / "out", [1])


@pytest.mark.parametrize("redirect", [True, False])
def test_a_file_of_this_computer_is_refused(make, go, tmp_path, redirect):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(2))
    board = make(post(3), post(2, **({} if redirect else {"file_url": secret.as_uri()})), post(1))
    if redirect:
        board.always["/image/2.png"] = lambda h: h.send(302, Location=secret.as_uri())
    assert go(board)[0] == 1
    check_folder(tmp_path / "out", [1, 3])


def test_file_names_do_not_come_from_the_board(make, go, tmp_path):
    urls = ["/image/../../../x.png", "/image/..%2f..%2fx.png", "/image/nul\0l.png", f"/image/{'x' * 300}.png",
            "/image/..\\..\\x.png", "/image/a b  c.png", "/image/\u58c1\u7d19.PNG", "/image/con.png",
            "/image/\x1b[2J.png"]
    board = make(*(post(n, file_url=f"{url}?{n}") for n, url in reversed(list(enumerate(urls, 1)))))
    out = tmp_path / "a" / "b" / "out"
    assert go(board, out=out)[0] == 0
    check_folder(out, range(1, len(urls) + 1))
    assert all(re.fullmatch(r"127\.0\.0\.1-\d+-[0-9a-f]{8}\.png", row["file"]) for row in manifest(out))
    assert [p for p in tmp_path.rglob("*") if not p.is_relative_to(out)] == [out.parent.parent, out.parent]


def test_texts_of_the_board_become_one_printable_line(make, go, tmp_path):
    text = 'a,"b"\r\n=1\x1b[2J\0\u2028\ud800 ' + "x" * 300000
    board = make(post(2, source=text, tags=text + " \u58c1\u7d19"), post(1, tags="\u58c1\u7d19"))
    assert go(board)[0] == 0
    check_folder(tmp_path / "out", [1, 2])
    data = (tmp_path / "out" / "manifest.csv").read_bytes()
    assert data.count(b"\n") == 3 and not {b"\x1b", b"\0", b"\r"} & {data[i:i + 1] for i in range(len(data))}
    first, second = manifest(tmp_path / "out")
    assert first["source"].startswith('a,"b" =1 [2J xxx') and second["tags"] == "\u58c1\u7d19"
    board.log.clear()
    assert go(board)[0] == 0 and not board.paths("/image")


def test_the_same_picture_is_downloaded_once(make, go, tmp_path):
    board = make(post(3, body=picture(2)), post(2), post(2), post(1))
    board.files["/image/3.png"] = picture(2)
    assert go(board)[0] == 0 and board.paths("/image") == ["/image/3.png", "/image/1.png"]
    other = make(post(1), post(4))
    assert go(other)[0] == 0 and other.paths("/image") == ["/image/4.png"]      # a second board, the same folder


# ------------------------------------------------------------------------------------------------------------
# The folder after an interruption
# ------------------------------------------------------------------------------------------------------------


def start(board, out, preexec_fn=None):
    code = "import scrape; scrape.PAUSE = 0; scrape.main()"
    return subprocess.Popen([sys.executable, "-c", code, "konachan", "--url", board.url, "-o", out,
                             "--contact", CONTACT], cwd=Path(scrape.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, preexec_fn=preexec_fn)


@pytest.mark.parametrize("stop, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes(make, go, tmp_path, stop, code):
    board, reached, done = make(*map(post, range(20, 0, -1))), threading.Event(), threading.Event()

    def stall(h):
        h.send(200, picture(9)[:300], length=600)
        reached.set()
        done.wait(30)
    board.once["/image/9.png"] = [stall]
    # a background shell makes its children ignore SIGINT
    process = start(board, tmp_path / "out", lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert reached.wait(30)
    process.send_signal(stop)
    _, printed = process.communicate(timeout=30)
    done.set()
    assert process.returncode == code and "Traceback" not in printed
    check_folder(tmp_path / "out", range(10, 21))
    assert go(board)[0] == 0
    check_folder(tmp_path / "out", range(1, 21))
    assert sorted(board.paths("/image")) == sorted([f"/image/{n}.png" for n in range(1, 21)] + ["/image/9.png"])


@pytest.mark.parametrize("cut, pictures", [(1, 1), (40, 1), (400, 2)])
def test_an_incomplete_manifest_is_repaired(make, go, tmp_path, cut, pictures):
    board, path = make(*map(post, range(5, 0, -1))), tmp_path / "out" / "manifest.csv"
    go(board)
    complete = path.read_bytes()
    path.write_bytes(complete[:-cut])
    board.log.clear()
    assert go(board)[0] == 0 and path.read_bytes() == complete and len(board.paths("/image")) == pictures


def test_a_manifest_saved_by_an_editor_is_accepted(make, go, tmp_path):
    board, path = make(post(2), post(1)), tmp_path / "out" / "manifest.csv"
    go(board)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    board.log.clear()
    assert go(board)[0] == 0 and not board.paths("/image")


def test_a_file_that_is_not_a_manifest_is_left_alone(make, go, tmp_path):
    board, path = make(post(1)), tmp_path / "out" / "manifest.csv"
    path.parent.mkdir()
    for data in (b"name;size\nx.png;7\n", b'"half', b"\xff\xfe\n", b"\n"):
        path.write_bytes(data)
        code, _, printed = go(board)
        assert code == 2 and "manifest.csv" in printed and not board.log and path.read_bytes() == data


def test_a_picture_that_the_user_removed_or_edited_is_left_alone(make, go, tmp_path):
    board, out = make(*map(post, range(5, 0, -1))), tmp_path / "out"
    go(board)
    before, names = (out / "manifest.csv").read_bytes(), {row["id"]: row["file"] for row in manifest(out)}
    (out / names["2"]).unlink()
    (out / names["4"]).write_bytes(b"edited")
    board.log.clear()
    assert go(board)[0] == 0 and not board.paths("/image") and not (out / names["2"]).exists()
    assert (out / "manifest.csv").read_bytes() == before and (out / names["4"]).read_bytes() == b"edited"


def test_a_replaced_picture_is_a_new_file(make, go, tmp_path):
    board = make(post(1))
    go(board)
    board.posts[0], board.files["/image/1.png"] = post(1, body=picture(1, 700)), picture(1, 700)
    assert go(board)[0] == 0
    assert [row["size"] for row in manifest(tmp_path / "out")] == ["600", "700"]


@pytest.mark.parametrize("large", [dict(source="s" * 15000), dict(body=picture(2, 30000))], ids=["row", "picture"])
def test_a_full_disk_ends_the_run_and_the_next_one_completes_the_folder(make, go, tmp_path, large):
    board, out = make(post(3), post(2, **large), post(1)), tmp_path / "out"
    board.files["/image/2.png"] = large.get("body", picture(2))
    limit = 10000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    process = start(board, out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 2 and "cannot write" in printed.splitlines()[-1]
    assert go(board)[0] == 0
    check_folder(out, [1, 2, 3])


def test_a_folder_that_cannot_be_created(make, go, tmp_path):
    board = make(post(1))
    (tmp_path / "file").write_text("mine")
    code, _, printed = go(board, out=tmp_path / "file" / "out")
    assert code == 2 and "file" in printed and not board.log and (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--rating", "x"], ["--url", "localhost:3000"], ["--contact", "nobody"], ["--contact", "a@b.c\r\nX: y"],
    ["--contact", "\u58c1@b.c"], ["--opt-out", "missing"]])
def test_wrong_arguments(monkeypatch, capsys, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scrape.urllib.request, "Request", lambda *_, **__: pytest.fail("a request"))
    monkeypatch.setattr(sys, "argv", ["scrape.py", "konachan", "-o", "out", "--contact", CONTACT, *flags])
    with pytest.raises(SystemExit) as end:
        scrape.main()
    assert end.value.code == 2 and flags[1].split("\r")[0] in capsys.readouterr().err


def test_status_line(make, go, monkeypatch):
    monkeypatch.setattr(sys.stderr.__class__, "isatty", lambda _: True)
    printed = go(make(*map(post, range(5, 0, -1))))[2]
    assert "4 of at most 300" in printed and re.search(r"\d\.\d\d MB/s", printed)


def test_the_file_works_alone_with_the_standard_library(tmp_path):
    (tmp_path / "scrape.py").write_bytes(Path(scrape.__file__).read_bytes())
    done = subprocess.run([sys.executable, "-I", "-S", "scrape.py", "--help"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"artists" in done.stdout
