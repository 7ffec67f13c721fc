"""Host, token, kind of body, other sites, and the headers of every answer."""

import pytest
from serve_data import TOKEN, message_of

from unime_st.serve.server import checked_hosts

JSON = {"Content-Type": "application/json"}
PATHS = ["/", "/about", "/thumbnails/0", "/page/app.js", "/page/index.html", "/nowhere", "/openapi.json", "/docs"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_names_of_loopback_are_taken(client, host):
    assert client().get("/about", headers={"Host": f"{host}:8123"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::2]", "127.0.0.1@evil"]
)
def test_other_names_are_refused(client, host):
    one = client()
    for method, path in (("GET", "/"), ("GET", "/about"), ("POST", "/v1/embeddings"), ("GET", "/page/style.css")):
        assert "is called" in message_of(one.request(method, path, headers={"Host": host}), 421)


def test_every_request_needs_the_token(client):
    one = client(token=TOKEN, hosts=None)
    for path in PATHS:
        assert "Give the token" in message_of(one.get(path), 401)
    for path in ("/search", "/v1/embeddings"):
        assert "Give the token" in message_of(one.post(path, json={"input": "a"}), 401)
        for given in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer \xe4"):
            headers = {"Authorization": given.encode("latin-1")}
            message_of(one.post(path, json={"input": "a"}, headers=headers), 401)
    for cookie in ("unime_token=", f"unime_token={TOKEN}", "unime_token=\x01", "a=b;;;=", "unime_token"):
        message_of(one.get("/about", headers={"Cookie": cookie}), 401)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert one.post("/v1/embeddings", json={"input": "a"}, headers=headers).status_code == 200
    assert one.get("/about", headers=headers).status_code == 200
    assert one.get("/about", params={"token": TOKEN}).status_code == 401  # addresses end up in logs


def test_a_browser_is_asked_for_the_token_and_keeps_it(client):
    one = client(token=TOKEN, hosts=None, headers={"Accept": "text/html"})
    asked = one.get("/")
    assert asked.status_code == 401
    assert "Token of this server" in asked.text
    wrong = one.post("/token", data={"token": "guess"})
    assert wrong.status_code == 401
    assert "That is not the token" in wrong.text
    assert "guess" not in wrong.text
    right = one.post("/token", data={"token": TOKEN}, follow_redirects=False)
    assert (right.status_code, right.headers["location"]) == (303, "/")
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in cookie
    assert one.get("/").status_code == 200
    assert one.get("/about").json()["rows"] == 30


def test_who_has_no_token_may_send_little(client):
    """20 MiB of a form take a processor half a minute, and of strangers' bodies there is no end."""
    one = client(token=TOKEN, hosts=None)
    for method, path, body in (
        ("POST", "/token", b"a=1&" * 2000),
        ("POST", "/token", b"token=" + b"%41" * 2000),
        ("GET", "/page/style.css", b" " * 5000),
    ):
        assert "4,096 bytes" in message_of(one.request(method, path, content=body), 413)
    assert one.get("/page/style.css").status_code == 200


def test_other_sites_may_not_ask(client):
    one = client()
    for site in ("cross-site", "same-site"):
        headers = {**JSON, "Sec-Fetch-Site": site, "Origin": "https://evil.example"}
        assert "other sites" in message_of(one.post("/search", json={"text": "a"}, headers=headers), 403)
    answer = one.options("/search", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx"],
)
def test_bodies_that_are_not_json_are_refused(client, kind):
    one = client()
    for path in ("/search", "/v1/embeddings"):
        answer = one.post(path, content=b'{"text": "a"}', headers={"Content-Type": kind})
        assert "application/json" in message_of(answer, 415)


def test_headers_of_every_answer(client):
    one = client()
    answers = [one.get(path) for path in PATHS] + [one.post("/search", json={}), one.post("/search", content=b"x")]
    assert {answer.status_code for answer in answers} >= {200, 400, 404, 415}
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "http" not in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers
    assert one.get("/docs").status_code == one.get("/openapi.json").status_code == 404


def test_the_page_names_nothing_outside(client):
    one = client()
    for path in ("/", "/page/app.js", "/page/style.css", "/page/token.html"):
        text = one.get(path).text
        assert "://" not in text
        assert "innerHTML" not in text


def test_errors_inside_are_not_told(client, world, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret of the machine")

    monkeypatch.setattr(world.model, "encode", broken)
    answer = client().post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("host", "token", "advice"),
    [
        ("0.0.0.0", None, "a token is needed"),
        ("192.168.0.7", None, "a token is needed"),
        ("::", None, "a token is needed"),
        ("localhost.evil.example", None, "a token is needed"),
        ("0.0.0.0", "short", "at least 16"),
        ("127.0.0.1", "short", "at least 16"),
        ("0.0.0.0", "long enough, but ä and ö", "ASCII"),
    ],
)
def test_listening_to_others_needs_a_token(host, token, advice):
    with pytest.raises(ValueError, match=advice):
        checked_hosts(host, token)


def test_hosts_by_where_it_listens():
    assert checked_hosts("0.0.0.0", TOKEN) is None
    assert checked_hosts("127.0.0.1", None) == ("127.0.0.1", "localhost", "[::1]")
    assert "127.0.0.2" in checked_hosts("127.0.0.2", None)


def test_an_application_that_nothing_guards_is_refused(client):
    with pytest.raises(ValueError, match="Without `token` and `hosts` anybody could ask"):
        client(hosts=None)
