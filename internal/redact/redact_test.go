package redact

import (
	"encoding/base64"
	"encoding/json"
	"net/url"
	"strings"
	"testing"
)

const pemKey = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgplantedPlanted\nZZ9plantedkeyline0000000000000000\n-----END PRIVATE KEY-----"

// planted are secrets in the forms in which they come, each with the part that must not be left.
var planted = []struct{ name, text, secret string }{
	{"a PEM key", pemKey, "planted"},
	{"an RSA key", strings.ReplaceAll(pemKey, "PRIVATE", "RSA PRIVATE"), "planted"},
	{"a PEM key in JSON", strings.ReplaceAll(pemKey, "\n", `\n`), "planted"},
	{"a PEM key that is cut off", pemKey[:strings.Index(pemKey, "-----END")], "planted"},
	{"the rest of a PEM key", pemKey[strings.Index(pemKey, "ZZ9"):], "planted"},
	{"a URL's password", "postgres://pergola:pl4nted!@db.example.org/pergola", "pl4nted"},
	{"a URL's password with an @", "http://anna:pl@nted@proxy:3128", "nted"},
	{"a URL's token", "https://pl4ntedtoken@git.example.org/x", "pl4nted"},
	{"a URL's parameter", "postgres://db/pergola?user=p&password=pl4nted&sslmode=require", "pl4nted"},
	{"a presigned URL", "https://s3.example.org/b/k?X-Amz-Signature=pl4nted0123&X-Amz-Date=1", "pl4nted"},
	{"a bearer token", "Authorization: Bearer pl4nted.token-1", "pl4nted"},
	{"a bearer token alone", `{"h":"bearer pl4ntedtoken"}`, "pl4nted"},
	{"basic", "Proxy-Authorization: Basic cGw0bnRlZDpwbDRudGVk", "cGw0"},
	{"a JWT", "got eyJhbGciOiJIUzI1NiJ9.eyJwbGFudGVkIjoxfQ.c2lnbmF0dXJl for it", "eyJwbGFudGVkIjoxfQ"},
	{"a join token", "pergola site join pergola-site-eyJrIjoic2l0ZSIsIm4iOiJhIn0abcdefg", "eyJrIjoic2l0"},
	{"a login token", `"pergola-user-pl4ntedpl4nted-_x"`, "pl4nted"},
	{"an AWS key id", "key AKIAIOSFODNN7EXAMPLE used", "AKIAIOSFODNN7"},
	{"an AWS secret key", "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalr"},
	{"AWS in the environment", "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "wJalr"},
	{"GitHub", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "0123456789abcdef"},
	{"GitLab", "glpat-0123456789abcdefghij", "0123456789"},
	{"Hugging Face", "hf_abcdefghijABCDEFGHIJ0123456789", "abcdefghij"},
	{"OpenAI", "OPENAI=sk-proj-abcdefghijABCDEFGHIJ", "abcdefghij"},
	{"Slack", "xoxb-123456789012-abcdef", "123456789012"},
	{"a variable", "DB_PASSWORD=pl4nted", "pl4nted"},
	{"a variable without underscore", "PGPASSWORD=pl4nted", "pl4nted"},
	{"TOML", `password = "pl4 nted"`, "nted"},
	{"TOML with single quotes", `api_key = 'pl4 nted'`, "nted"},
	{"YAML", "secret: pl4nted", "pl4nted"},
	{"JSON", `{"access_key": "pl4 nted", "x": 1}`, "nted"},
	{"JSON within JSON", `{"msg": "{\"password\": \"pl4 nted\"}"}`, "nted"},
	{"Go's %q", `env ["token" "x" "secret=pl4nted"]`, "pl4nted"},
	{"a flag", "flwr run --token pl4nted --x", "pl4nted"},
	{"a flag with =", "flwr run --api-key=pl4nted", "pl4nted"},
	{"Python's dict", `{'password': 'pl4nted'}`, "pl4nted"},
	{"Go's map", "map[token:pl4nted x:1]", "pl4nted"},
	{"a name behind a name", "the secret: aws_secret_access_key = pl4nted", "pl4nted"},
	{"age", "AGE-SECRET-KEY-1QPL4NTEDQQQ", "PL4NTED"},
	{"Cookie", "Cookie: session=pl4nted", "pl4nted"},
}

func TestSecretsGo(t *testing.T) {
	for _, c := range planted {
		t.Run(c.name, func(t *testing.T) {
			for _, around := range []string{"%", "before % after", "a line\n%\nanother", `{"time":1,"msg":"%"}`} {
				in := strings.ReplaceAll(around, "%", c.text)
				got := Text(in)
				if strings.Contains(got, c.secret) || !strings.Contains(got, Mark) {
					t.Errorf("of %q is left %q", in, got)
				}
				if again := Text(got); again != got {
					t.Errorf("twice is not once: %q, %q", got, again)
				}
				if strings.HasPrefix(around, "a line") && (!strings.HasPrefix(got, "a ") || !strings.HasSuffix(got, "\nanother")) && !strings.Contains(c.name, "PEM key that is cut") {
					t.Errorf("the neighbours are gone: %q", got)
				}
			}
		})
	}
}

func TestOrdinaryTextStays(t *testing.T) {
	for _, s := range []string{
		"", "a site is connected site=st-anna", "listening on 127.0.0.1:8443",
		`{"time":"2026-11-27T04:52:56Z","level":"INFO","msg":"the hub listens","address":"[::]:8443"}`,
		"the hub cannot be reached at hub.example.org:8443 (connection refused)",
		"https://hub.example.org:8443/pergola.v1.JobService/GetJob", "sha256:0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0",
		"round 3 of 10, loss=0.53, accuracy: 0.91", "job 01kb2q3r4s5t6v7w8x9yza0b1c ended: succeeded", "a key of the table", "the authority's fingerprint",
		"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----", "mail admin@example.org", "the proxy http://proxy:3128 (from HTTPS_PROXY) refused",
		"pergola site join TOKEN",
	} {
		if got := Text(s); got != s {
			t.Errorf("%q became %q", s, got)
		}
	}
}

func TestKnownSecrets(t *testing.T) {
	var r Redactor
	r.Keep("st-anna")
	const secret = `hunter2 & "Söhne"/x`
	r.Learn(secret, "yes", "st-anna")
	r.LearnURL("http://anna:pr%40xypass@proxy:3128")
	r.LearnURL("postgres://u@db/x?password=querypass")
	r.LearnURL("postgres://u:bad%zzpass@db/x")
	asJSON, err := json.Marshal(map[string]string{"m": secret})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		secret, "x" + secret + "y", string(asJSON), url.QueryEscape(secret), "pr@xypass", "pr%40xypass", "querypass!", "bad%zzpass", "anna:pr%40xypass",
		base64.StdEncoding.EncodeToString([]byte(secret)), base64.StdEncoding.EncodeToString([]byte("a:" + secret + "tail")), base64.URLEncoding.EncodeToString([]byte("ab:" + secret)),
	} {
		if got := r.Text("it is " + s + " here"); !strings.Contains(got, Mark) || strings.Contains(got, "hunter2") || strings.Contains(got, "xypass") {
			t.Errorf("of %q is left %q", s, got)
		}
	}
	for _, s := range []string{"yes", "st-anna", "u", "anna is here"} {
		if got := r.Text(s); got != s {
			t.Errorf("%q became %q", s, got)
		}
	}
}

func TestJSONStaysJSON(t *testing.T) {
	var r Redactor
	r.Learn("supersecret")
	if got, want := string(r.JSON([]byte("{\n \"env\": {\n  \"A\": \"short\", \"B\": 1},\n \"Env\": \"x\"\n}"))), `{"Env":"x","env":{"A":"[removed]","B":"[removed]"}}`+"\n"; got != want {
		t.Errorf("an environment: %s", got)
	}
	in := `{"seq":12345678901234567890,"body":{"password":"a b","env":["x supersecret y",1,null,true],"token":17,"a supersecret one":1,"url":"http://u:p@h/","html":"<&>"}}` + "\nno JSON, but supersecret\n[1,2]"
	want := `{"body":{"a [removed] one":1,"env":["x [removed] y",1,null,true],"html":"<&>","password":"[removed]","token":"[removed]","url":"http://[removed]@h/"},"seq":12345678901234567890}` +
		"\nno JSON, but [removed]\n[1,2]\n"
	if got := string(r.JSON([]byte(in))); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// However a secret is surrounded, it goes; what is taken out once stays out; JSON stays JSON.
func FuzzText(f *testing.F) {
	for i, c := range planted {
		f.Add("before", "after", c.text, uint8(i))
	}
	f.Add("\"password\": \"\\", "-----END PRIVATE KEY-----", "token=", uint8(0))
	f.Fuzz(func(t *testing.T, before, after, free string, n uint8) {
		c := planted[int(n)%len(planted)]
		for _, gap := range []string{"\n", " \n\t"} {
			got := Text(before + gap + c.text + gap + after)
			if strings.Contains(got, c.secret) && !strings.Contains(before+gap+after, c.secret) {
				t.Errorf("%s is left in %q", c.name, got)
			}
		}
		var r Redactor
		r.Learn("s3cr3t" + free)
		if got := r.Text(before + "s3cr3t" + free + after); len(strings.TrimSpace(free)) > 0 && !strings.Contains(before+after, "s3cr3t") && strings.Contains(got, strings.TrimSpace("s3cr3t"+free)) {
			t.Errorf("a known secret is left in %q", got)
		}
		b, err := json.Marshal(map[string]any{"message": before + free, "token": free, after: []any{free, 1.5}})
		if err != nil {
			t.Fatal(err)
		}
		if out := r.JSON(b); !json.Valid(out) {
			t.Errorf("%q became %q", b, out)
		}
	})
}
