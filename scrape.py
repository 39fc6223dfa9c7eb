"""scrape.py: pictures from Konachan, Yande.re or Danbooru -> a folder and a manifest. Original files, md5 checked.

    python scrape.py konachan --tags landscape --max 300 --contact me@example.org -o wallpapers

The same command goes on where it was stopped, killed or ran out of room. It is slow on purpose: one request a second,
over pages and pictures alike, longer when the board asks for it, and it ends at a challenge page instead of going
around it. The pictures belong to their artists: what may be done with them is for them and for the board's terms to
say, so read both before you train on them or pass them on, and leave out who asks to be left out (--opt-out).

Needs the standard library only.
"""
import argparse
import collections
import contextlib
import csv
import email.utils
import hashlib
import http.client
import io
import ipaddress
import json
import os
import re
import socket
import ssl
import sys
import time
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlencode, urljoin, urlsplit

BOARDS = dict(konachan="https://konachan.com", yandere="https://yande.re", danbooru="https://danbooru.donmai.us")
COLUMNS = ["id", "board", "page", "url", "md5", "size", "width", "height", "rating", "tags", "artists", "source",
           "licence", "file"]                       # size in bytes; width and height in pixels; tags split by spaces
RATINGS = dict(     # a board's letter: (what it is to --rating, the word for the manifest); s is not s everywhere
    moebooru=dict(s=("s", "safe"), q=("q", "questionable"), e=("e", "explicit")),
    danbooru=dict(g=("s", "general"), s=("q", "sensitive"), q=("q", "questionable"), e=("e", "explicit")))
PICTURES = {"jpg", "jpeg", "png", "webp", "avif"}   # the boards have films and zips too
PER_PAGE, PAGES = 100, 1000                         # posts of one request; Danbooru goes no deeper
PAGE_BYTES, FILE_BYTES = 32 << 20, 512 << 20        # nothing larger is taken, whatever the board announces
TRIES, SILENCE = 6, 30                              # of one request; seconds without a byte
SLOWEST, PATIENCE = 1800, 900                       # seconds one body may take; longest wait that is sat out
IN_A_ROW = 3                                        # pictures lost because nobody answers: then the board is down


class Stop(Exception):
    """The run cannot go on; the message is the one line that says why."""


class Failed(Exception):
    """One address cannot be had. silent: because nobody answered."""
    def __init__(self, message, silent=False):
        super().__init__(message)
        self.silent = silent


def clean(text):
    """Anything -> one line of at most 20,000 printable characters, fit for a terminal and for a row of the manifest."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:20000]).split())


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(line, passing=False, shown=[time.monotonic()]):
    """To stderr. A passing line is overwritten by the next on a terminal, and one of many elsewhere."""
    terminal = sys.stderr.isatty()
    if passing and not terminal and time.monotonic() - shown[0] < 30:
        return
    shown[0] = time.monotonic() if passing else shown[0]
    line = f"\r\033[K{line}" if terminal else line
    print(line, end="" if terminal and passing else "\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Requests with manners
# ---------------------------------------------------------------------------------------------------------------------


def retry_after(value):
    """A Retry-After header, seconds or an HTTP date (RFC 9110, 10.2.3) -> seconds from now, 0 if it says nothing."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", value or ""):
        return int(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Client:
    """GET, one at a time and pause seconds apart. base: the board's address; named: the user gave it, so that its one
    host and port may be private."""

    def __init__(self, base, named, contact, pause):
        parts = urlsplit(base)
        self.home = (parts.hostname, parts.port or dict(https=443, http=80)[parts.scheme])
        self.scheme, self.named, self.pause, self.ready = parts.scheme, named, pause, 0.0
        self.headers = {"User-Agent": f"kabegami-scrape/1 (contact: {contact})", "Accept": "*/*", "Connection": "close"}
        self.tls = ssl.create_default_context()

    def connect(self, url):
        """-> an open connection, what to ask it for. The name is resolved once, checked, and that address used."""
        try:
            parts = urlsplit(url)
            here = host, port = parts.hostname, parts.port or dict(https=443, http=80)[parts.scheme]
            if parts.scheme not in ("https", self.scheme) or not host:
                raise ValueError
            if self.pause < 1 and here != self.home:
                raise Failed(f"refused {clean(url)[:200]}: --pause below 1 is for the board itself")
            places = [place[4][:2] for place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (ValueError, KeyError):      # among them a name that cannot be one
            raise Failed(f"refused {clean(url)[:200]}: no {self.scheme} address") from None
        for ip in (ipaddress.ip_address(place[0].partition("%")[0]) for place in places):
            if (ip.is_multicast or not ip.is_global) and not (self.named and here == self.home):
                raise Failed(f"refused {clean(url)[:200]}: {ip} is private, and not what --url named (some VPNs and proxies "
                             "answer with such addresses; they do not work here)")
        for i, place in enumerate(places, 1):
            try:
                plain = socket.create_connection(place, SILENCE)
                break
            except OSError:
                if i == len(places):
                    raise
        kind = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
        connection = kind(host, port)
        connection.sock = plain if parts.scheme == "http" else self.tls.wrap_socket(plain, server_hostname=host)
        path, keep = parts.path or "/", "/%:@!$&'()*+,;=~?"
        return connection, quote(path, keep) + (f"?{quote(parts.query, keep)}" if parts.query else "")

    @contextlib.contextmanager
    def request(self, url):
        """One request and its redirects, each of them a request of its own -> the response."""
        for _ in range(6):
            time.sleep(max(0.0, self.ready - time.monotonic()))
            with contextlib.ExitStack() as opened:
                try:
                    connection, target = self.connect(url)
                    opened.callback(connection.close)
                    connection.request("GET", target, headers=self.headers)
                    response = opened.enter_context(connection.getresponse())
                finally:                        # counted from the answer, so that none reaches the board too early
                    self.ready = time.monotonic() + self.pause
                moved = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
                if moved is None:
                    yield response
                    return
                try:
                    url = urljoin(url, moved)
                except ValueError:
                    raise Failed(f"redirected to {clean(moved)[:200]}, which is no address") from None
        raise Failed("redirected too often")

    def get(self, url, out, limit):
        """The body of url into the file out -> (md5, bytes); tries again where that may help.

        Raises Failed, also for more than limit bytes; Stop at a challenge page, when the board wants no more of us, or
        when out cannot be written.
        """
        host = urlsplit(url).hostname
        for attempt in range(1, TRIES + 1):
            out.seek(0)
            out.truncate()
            status, asked = 0, 0
            try:
                with self.request(url) as response:
                    status, asked = response.status, retry_after(response.headers.get("Retry-After"))
                    if status == 200:
                        return self.save(response, out, limit)
                    reason = self.refusal(response)
            except ssl.SSLCertVerificationError as e:
                raise Failed(f"its certificate is not valid: {clean(e.verify_message)}") from None
            except (OSError, http.client.HTTPException) as e:
                reason = clean(getattr(e, "strerror", None) or e)[:200] or type(e).__name__
            if asked > PATIENCE:
                raise Stop(f"{host} asks to wait for {clock(asked)} ({reason}); the same command goes on then")
            wait = max(asked, min(PATIENCE, self.pause * 2 ** attempt))
            self.ready = max(self.ready, time.monotonic() + wait)
            if attempt < TRIES:
                say(f"{host}: {reason}; waiting {wait:.3g} s")
        if status in (421, 429):
            raise Stop(f"{host} still says {reason} after {TRIES} tries; come back in an hour or so")
        raise Failed(f"{reason}, {TRIES} times", silent=True)

    def save(self, response, out, limit):
        """A response's body into out -> (md5, bytes)."""
        digest, total, begun, length = hashlib.md5(usedforsecurity=False), 0, time.monotonic(), response.length
        while length is None or total < length:
            chunk = response.read1(65536 if length is None else min(65536, length - total))
            if not chunk:
                break
            if not total and chunk.lstrip()[:1] == b"<":
                raise Stop("a web page came where JSON or a picture was due, a challenge or a login; look at the board "
                           "in a browser, and come back later")
            total += len(chunk)
            if max(total, length or 0) > limit:
                raise Failed(f"it is longer than the {limit} bytes that are due")
            if time.monotonic() - begun > SLOWEST:
                raise Failed(f"not there after {clock(SLOWEST)}", silent=True)
            digest.update(chunk)
            try:
                out.write(chunk)
            except OSError as e:
                raise no_room(out.name, e) from None
        if length is not None and total < length:
            raise ConnectionError(f"broke off after {total} of {length} bytes")
        return digest.hexdigest(), total

    def refusal(self, response):
        """-> what to say, if another try may help (421 is Moebooru's "user throttled"); otherwise raises Failed, or
        Stop at a challenge, and where Cloudflare bars us (in plain text, "error code: 1020")."""
        body, headers, status = response.read1(4096), response.headers, response.status
        page = "html" in headers.get("Content-Type", "").lower() or body.lstrip()[:1] == b"<"
        cloudflare = "cloudflare" in headers.get("Server", "").lower()
        if status == 403 and body.startswith(b"error code:"):
            raise Stop(f"the board bars us ({status}, {clean(body.decode('ascii', 'replace'))[:40]}); look at it in a browser, "
                       "and come back later")
        if headers.get("cf-mitigated") or (page and (status == 403 or status == 503 and cloudflare)):
            raise Stop(f"a challenge page ({status}) came where JSON or a picture was due; look at the board in a "
                       "browser, and come back later")
        reason = response.reason
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            found = json.loads(body)
            reason = found.get("message") or found.get("reason") or reason     # Danbooru's, Moebooru's
        reason = f"{status} {clean(reason)[:200]}"
        if status in (421, 429) or status >= 500:
            return reason
        raise Failed(reason)


# ---------------------------------------------------------------------------------------------------------------------
# What the board has. want: the parsed arguments with what prepare() adds
# ---------------------------------------------------------------------------------------------------------------------


def query(want):
    """The user's tags and what narrows the search on the board's side; read_post() checks the same once more."""
    tags, others = " ".join(want.tags).split(), RATINGS[want.kind].keys() - want.ratings
    if want.kind == "danbooru" and others:
        tags.append("rating:" + ",".join(sorted(want.ratings)))
    elif others:                            # Moebooru knows one letter, or all but one
        tags.append(f"-rating:{min(others)}" if len(others) == 1 else f"rating:{min(want.ratings)}")
    return " ".join(tags + [f"width:>={want.min_width}"] * (want.min_width > 0))


def read_page(client, want, number):
    """One page of the search -> (posts as they came, {tag: its type}); Moebooru sends the types apart."""
    ask, body = dict(tags=query(want), limit=PER_PAGE, page=number), io.BytesIO()
    if want.kind == "moebooru":
        ask.update(api_version=2, include_tags=1)
    try:
        client.get(f"{want.base}/post{'s' * (want.kind == 'danbooru')}.json?{urlencode(ask)}", body, PAGE_BYTES)
        found, types = json.loads(body.getvalue()), {}
    except Failed as e:
        raise Stop(f"page {number} of {want.base}: {e}") from None
    except (ValueError, RecursionError):
        raise Stop(f"page {number} of {want.base} is not JSON; is it a {want.kind} board?") from None
    if isinstance(found, dict):
        found, types = found.get("posts"), found.get("tags")
    if not isinstance(found, list):
        raise Stop(f"page {number} of {want.base} is no list of posts; is it a {want.kind} board?")
    return found, types if isinstance(types, dict) else {}


def read_post(raw, types, want):
    """A post as it came -> its row of the manifest, with the announced size (0: none), and a file name of our own.
    Raises ValueError with the reason why it is passed over, in words that can be counted."""
    def text(key):
        return raw[key] if isinstance(raw.get(key), str) else ""

    def number(key):
        return raw[key] if type(raw.get(key)) is int and 0 < raw[key] < 2 ** 63 else 0

    danbooru = want.kind == "danbooru"
    tags, artists = text("tag_string" if danbooru else "tags").split(), text("tag_string_artist").split()
    artists = artists or [tag for tag in tags if types.get(tag) in ("artist", "circle")]
    width, height = (number("image_" * danbooru + side) for side in ("width", "height"))
    if text("rating") not in want.ratings:
        raise ValueError("of another rating")
    if width < want.min_width:
        raise ValueError("too narrow")
    if not want.variants and (raw.get("parent_id") or raw.get("has_children")):
        raise ValueError("variants")
    if want.opted_out & {tag.lower() for tag in tags + artists} or raw.get("is_banned"):
        raise ValueError("opted out or taken down")
    try:
        url, md5 = quote(urljoin(f"{want.base}/", text("file_url")), ":/?#[]@!$&'()*+,;=%~"), text("md5").lower()
        suffix = PurePosixPath(urlsplit(url).path).suffix[1:].lower()
        if not (number("id") and text("file_url") and len(url) < 4096 and re.fullmatch("[0-9a-f]{32}", md5)):
            raise ValueError
    except ValueError:                      # urlsplit and quote raise it too
        raise ValueError("without a file") from None
    if suffix not in PICTURES:
        raise ValueError("no pictures")
    if number("file_size") > FILE_BYTES:
        raise ValueError(f"over {FILE_BYTES >> 20} MiB")
    page = f"{want.base}/posts/{raw['id']}" if danbooru else f"{want.base}/post/show/{raw['id']}"
    return dict(zip(COLUMNS, (
        str(raw["id"]), want.name, page, url, md5, str(number("file_size")), str(width), str(height),
        RATINGS[want.kind][raw["rating"]][1], clean(" ".join(tags)), clean(" ".join(artists)), clean(text("source")),
        clean(text("license") or text("licence")), f"{want.name}-{raw['id']}-{md5[:8]}.{suffix}")))


def search(client, want):
    """-> (the rows that are wanted, how many posts were passed over for which reason). Ends when --max are found, at a
    page with nothing new, and after PAGES pages."""
    rows, passed, seen = {}, collections.Counter(), set()
    for number in range(1, PAGES + 1):
        posts, types = read_page(client, want, number)
        before = len(seen)
        for raw in posts:
            raw = raw if isinstance(raw, dict) else {}
            key = str(raw.get("id"))
            if key in seen:
                continue
            seen.add(key)
            try:
                row = read_post(raw, types, want)
                rows.setdefault(row["md5"], row)
            except ValueError as e:
                passed[str(e)] += 1
            if len(rows) == want.max:
                return list(rows.values()), passed
        if len(seen) == before:
            break
        say(f"page {number}: {len(seen)} posts, {len(rows)} wanted", passing=True)
    return list(rows.values()), passed


# ---------------------------------------------------------------------------------------------------------------------
# The folder: pictures, and manifest.csv, to which a line is added per picture, whole or not at all
# ---------------------------------------------------------------------------------------------------------------------


def no_room(path, e):
    return Stop(f"cannot write {clean(path)}: {e.strerror or e}; the same command goes on when that is mended")


def read_manifest(path, mend=True):
    """-> its rows, [] if there is none. Half a line at its end is cut off, a whole one that an editor left without its end
    gets one; with mend=False only in what is returned. Raises Stop if it is not ours."""
    try:
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        lines = list(csv.reader(io.StringIO(data[:end].decode("utf-8-sig"), newline=""), strict=True))
        ours = lines[0] == COLUMNS if lines else ",".join(COLUMNS).encode().startswith(data)
        last = next(csv.reader([data[end:].decode("utf-8", "replace")]), []) if lines and end < len(data) else []
        whole = len(last) == len(COLUMNS) and is_there(path.parent, dict(zip(COLUMNS, last)))
        lines += [last] * whole
        if ours and mend and whole:
            with open(path, "ab") as file:
                file.write(b"\n")
        elif ours and mend and end < len(data):
            os.truncate(path, end)
    except (OSError, ValueError, csv.Error) as e:
        raise Stop(f"cannot use {clean(path)}: {clean(e)}; mend it or choose another folder") from None
    if not ours:
        raise Stop(f"{clean(path)} is no manifest of scrape.py, by its first line; choose another folder")
    return [dict(zip(COLUMNS, line)) for line in lines[1:] if len(line) == len(COLUMNS)]


def add_row(path, row):
    """Raises OSError, and then as if it had not begun."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    before = os.fstat(file).st_size
    try:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(([] if before else [COLUMNS]) + [list(row.values())])
        line = text.getvalue().encode()
        while line:
            line = line[os.write(file, line):]
        os.fsync(file)
    except BaseException:                   # a full disk, or Ctrl-C
        os.ftruncate(file, before)
        raise
    finally:
        os.close(file)


def is_there(folder, row):
    """Whether the picture of a row of the manifest stands in the folder, perhaps edited since."""
    return os.path.isfile(folder / row["file"])


def fetch(client, row, folder, known):
    """One picture into the folder, and into the manifest unless its name is known there -> bytes received: 0 if a run
    that was killed had left it whole. Raises Failed, nothing left behind, or Stop."""
    target, due, size = folder / row["file"], int(row["size"]), 0
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists():
            if hashlib.md5(target.read_bytes(), usedforsecurity=False).hexdigest() != row["md5"]:
                raise Failed("what stands there under this name has another md5; move it away, and the picture comes")
        else:
            with open(part, "wb") as file:
                md5, size = client.get(row["url"], file, due or FILE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            if due and size != due:
                raise Failed(f"{size} bytes came where {due} are due")
            if md5 != row["md5"]:
                raise Failed(f"its md5 is {md5} where {row['md5']} is due")
            os.replace(part, target)
        if target.name not in known:
            add_row(folder / "manifest.csv", {**row, "size": target.stat().st_size})
    except OSError as e:
        raise no_room(target, e) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return size


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main():
    p = argparse.ArgumentParser(
        description="Fetch original pictures from an image board, slowly, with a manifest of where each came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n"
               "  python scrape.py konachan --tags landscape --max 300 --contact me@example.org -o wallpapers\n"
               "The same command again goes on where it stopped and fetches nothing twice that\n"
               "is still there.\n\n"
               "--rating s is what Konachan and Yande.re call safe and Danbooru general; q adds questionable and\n"
               "Danbooru's sensitive (its letter s); e is explicit everywhere. Without an account Danbooru searches\n"
               "for two tags at most; rating and width, which are added here, do not count.\n\n"
               "The pictures belong to their artists: respect them and the board's terms before you train on pictures\n"
               "or pass them on.\n\n"
               "exit code: 0 done, 1 some pictures failed (named), 2 could not go on (the line says why), 130 Ctrl-C")
    p.add_argument("board", choices=BOARDS, help="where from; with --url, what kind of board that is")
    p.add_argument("--tags", nargs="+", default=[], metavar="TAG",
                   help='what to search for, as on the board, in quotes: "landscape -chibi" (default: everything)')
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for the pictures and manifest.csv")
    p.add_argument("--contact", required=True, help="your mail or web address, told to the board with every request")
    p.add_argument("--max", type=int, default=300, help="posts wanted, those already here included (default: 300)")
    p.add_argument("--min-width", type=int, default=3840, help="pixels of the original (default: 3840)")
    p.add_argument("--rating", default="s", help="letters out of s, q, e, such as sq; see below (default: s)")
    p.add_argument("--variants", action="store_true", help="also posts that are a parent or a child of another")
    p.add_argument("--opt-out", type=Path, metavar="FILE", help="artists or other tags, one a line, that are left out")
    p.add_argument("--dry-run", action="store_true", help="search and count only")
    p.add_argument("--resume", action="store_true", help="needless: every run goes on where the last one stopped")
    p.add_argument("--pause", type=float, default=1.0, help="seconds between requests, 1 or more (default: 1)")
    p.add_argument("--url", help="another board of that kind, such as http://localhost:3000: the one address that may "
                                 "be private; on loopback --pause may be below 1")
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a folder in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(prepare(p.parse_args()))
    except Stop as e:
        say(f"error: {e}")
        code = 2
    except KeyboardInterrupt:
        say("stopped; what was fetched stays, and the same command goes on")
        code = 130
    sys.exit(code)


def prepare(args):
    """Checks the arguments and adds base, kind, name, ratings and opted_out. Raises Stop."""
    args.base = (args.url or BOARDS[args.board]).rstrip("/")
    args.kind = "danbooru" if args.board == "danbooru" else "moebooru"
    try:
        parts = urlsplit(args.base)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query or parts.port == 0:
            raise ValueError
    except ValueError:
        raise Stop(f"--url {clean(args.url)} is no address; give one such as http://localhost:3000") from None
    if not (args.contact.isascii() and args.contact.isprintable() and re.search(r"\w@\w|https?://\w", args.contact)):
        raise Stop(f"--contact {clean(args.contact)} is neither a mail nor a web address; give one that reaches you")
    if not (0 if args.url and is_loopback(parts.hostname) else 1) <= args.pause <= PATIENCE:
        raise Stop(f"--pause {args.pause:g} does not work; use 1 to {PATIENCE}, and less only with --url on loopback")
    if args.max < 1 or args.min_width < 0:
        raise Stop(f"--max {args.max} --min-width {args.min_width} do not work; use 1 or more, and 0 or more")
    if not args.rating or set(args.rating) - set("sqe"):
        raise Stop(f"--rating {clean(args.rating)} does not work; use letters out of s, q, e, such as sq")
    try:
        lines = args.opt_out.read_text("utf-8-sig").splitlines() if args.opt_out else []
    except (OSError, ValueError) as e:
        raise Stop(f"cannot read {clean(args.opt_out)}: {clean(getattr(e, 'strerror', None) or e)}") from None
    args.opted_out = {"_".join(line.lower().split()) for line in lines if line.strip()}
    args.ratings = {letter for letter, (asked, _) in RATINGS[args.kind].items() if asked in args.rating}
    place = parts.netloc.lower() if args.url else args.board
    args.name = re.sub("[^a-z0-9.]+", "-", place).strip("-.")[:60]
    return args


@contextlib.contextmanager
def alone(path, what):
    """Raises Stop if another process is within, and OSError; whoever is killed within leaves the file path, and no lock."""
    with open(path, "ab") as file:
        try:
            try:
                import fcntl
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:     # Windows
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            raise Stop(f"{clean(what)} is being fetched into {clean(path.parent)} by another process; wait for it") from None
        except OSError:             # a disk without locks
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):      # Windows removes nothing that is open
                path.unlink()


def run(args):
    """The command -> exit code. Raises Stop."""
    with contextlib.ExitStack() as stack:
        try:
            if not args.dry_run:
                args.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(args.out / f".{args.name}.lock", args.name))
                for old in args.out.glob(f"{args.name}-*.part"):    # left behind by a killed run
                    old.unlink()
                trial = args.out / f"{args.name}-trial.part"
                trial.write_bytes(b"room?")
                trial.unlink()
        except OSError as e:
            raise no_room(args.out, e) from None
        return fetch_all(args)


def fetch_all(args):
    """Raises Stop."""
    kept = read_manifest(args.out / "manifest.csv", not args.dry_run)
    client = Client(args.base, bool(args.url), args.contact, args.pause)
    rows, passed = search(client, args)
    here = {row["md5"] for row in kept if is_there(args.out, row)}
    todo = [row for row in rows if row["md5"] not in here]
    changed = [row["file"] for row in kept if is_there(args.out, row)
               and str(os.stat(args.out / row["file"]).st_size) != row["size"]]
    if changed:
        say(f"{len(changed)} pictures are no longer as they were fetched, and stay so, as {clean(changed[0])}; move away "
            "what is to be fetched again")
    skipped = f"; passed over: {', '.join(f'{n} {why}' for why, n in passed.most_common())}" if passed else ""
    if args.dry_run:
        say(f"{len(rows) - len(todo)} of {len(rows)} pictures are here{skipped}")
        print(f"{len(todo)} to fetch, {sum(int(row['size']) for row in todo) / 1e6:.1f} MB as announced, in at least "
              f"{clock(len(todo) * args.pause)}")
        return 0

    known, begun, fetched, received, failed, silent = {row["file"] for row in kept}, time.monotonic(), 0, 0, 0, 0
    for count, row in enumerate(todo):
        each = (time.monotonic() - begun) / count if count else args.pause
        say(f"{count}/{len(todo)}  {received / max(each * count, 0.01) / 1e6:.2f} MB/s  "
            f"{clock(each * (len(todo) - count))} left", passing=True)
        try:
            size = fetch(client, row, args.out, known)
            fetched, received, silent = fetched + (size > 0), received + size, 0
        except Failed as e:
            say(f"failed: {row['file']}: {e}")
            failed, silent = failed + 1, (silent + 1) * e.silent
            if silent == IN_A_ROW:
                raise Stop(f"{IN_A_ROW} pictures in a row and no answer; the same command goes on later") from None
    say(f"{len(rows)} pictures wanted, {len(rows) - len(todo)} were here{skipped}")
    print(f"{fetched} pictures fetched ({received / 1e6:.1f} MB) into {clean(args.out)}"
          + (f", {failed} failed" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    main()
