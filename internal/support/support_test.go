package support

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/hub"
	"github.com/pergolafl/pergola/internal/job"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/redact"
	"github.com/pergolafl/pergola/internal/site"
	"github.com/pergolafl/pergola/internal/store/pgtest"
	"github.com/pergolafl/pergola/internal/store/sqlite"
)

// secrets are planted everywhere, each in a form of its own; need is the part that may be nowhere in a bundle.
type secret struct{ text, need string }

func secrets(t *testing.T) map[string]secret {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pemKey, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	token := enrol.Token{Kind: pki.KindSite, Name: "st-anna", Hubs: []string{"hub:1"}, Secret: enrol.NewSecret(), Expires: time.Now()}.String()
	user := enrol.Token{Kind: pki.KindUser, Name: "maria", Hubs: []string{"hub:1"}, Secret: enrol.NewSecret(), Expires: time.Now()}.String()
	return map[string]secret{
		"a private key":       {string(pemKey), strings.Split(string(pemKey), "\n")[1][20:50]},
		"a URL's password":    {"postgres://pergola:planted-pw-1@db.example.org/pergola", "planted-pw-1"},
		"a proxy's password":  {"http://anna:planted%2Dpw-2@proxy.example.org:3128", "planted%2Dpw-2"},
		"a URL's parameter":   {"https://s3.example.org/x?X-Amz-Signature=plantedsig3&a=b", "plantedsig3"},
		"a bearer token":      {"Authorization: Bearer planted.bearer-4", "planted.bearer-4"},
		"basic":               {"Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("anna:planted-pw-5")), base64.StdEncoding.EncodeToString([]byte("anna:planted-pw-5"))[4:]},
		"a join token":        {token, token[len("pergola-site-")+10:][:30]},
		"a login token":       {user, user[len("pergola-user-")+10:][:30]},
		"an AWS key id":       {"AKIAPLANTED000000001", "PLANTED000000001"},
		"an AWS secret":       {"aws_secret_access_key = plantedAWS/secret/key000000000000000001", "plantedAWS"},
		"a GitHub token":      {"ghp_planted00000000000000000000000000001", "planted0000000000000"},
		"a Hugging Face one":  {"hf_planted0000000000000000000000002", "planted000000000000000000000000"},
		"a JWT":               {"eyJhbGciOiJIUzI1NiJ9.eyJwbGFudGVkIjo3fQ.plantedSignature07", "plantedSignature07"},
		"a password in words": {"password = \"planted pw 8\"", "planted pw 8"},
		"a flag":              {"--api-key planted-key-9", "planted-key-9"},
		"JSON":                {`{"token": "planted-token-10"}`, "planted-token-10"},
	}
}

// all is a text with each of the secrets, as a careless program would log them.
func all(ss map[string]secret) string {
	var b strings.Builder
	for name, s := range ss {
		fmt.Fprintf(&b, "a line before\nnow comes %s: %s\na line after\n", name, s.text)
	}
	return b.String()
}

// unpack gives the files of a bundle, by name without its folder.
func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the bundle's mode is %v, %v", info.Mode(), err)
	}
	zr, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for tr := tar.NewReader(zr); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		_, name, _ := strings.Cut(h.Name, "/")
		out[name] = string(b)
	}
}

// clean wants that none of the secrets is anywhere in the bundle, in no file and no file's name, as it is or in base64.
func clean(t *testing.T, files map[string]string, ss map[string]secret, more ...string) {
	t.Helper()
	for _, s := range ss {
		more = append(more, s.need)
	}
	for name, text := range files {
		for _, s := range more {
			for _, form := range []string{s, base64.StdEncoding.EncodeToString([]byte(s)), strings.ReplaceAll(s, "%2D", "-")} {
				if i := strings.Index(text, form); i >= 0 {
					t.Errorf("%s has %q: …%s…", name, form, text[max(0, i-60):min(len(text), i+60)])
				}
				if strings.Contains(name, form) {
					t.Errorf("a file is called %s", name)
				}
			}
		}
	}
}

func manifest(t *testing.T, files map[string]string) Manifest {
	t.Helper()
	var m Manifest
	if err := json.Unmarshal([]byte(files["MANIFEST.json"]), &m); err != nil {
		t.Fatalf("%v\n%s", err, files["MANIFEST.json"])
	}
	if len(m.Files) != len(files)-1 || m.Made.IsZero() || len(m.Never) == 0 {
		t.Errorf("the manifest has %d files of %d: %+v", len(m.Files), len(files)-1, m)
	}
	for _, f := range m.Files {
		if text, ok := files[f.Name]; !ok || len(text) != f.Bytes || f.About == "" || f.Removed != strings.Count(text, redact.Mark) {
			t.Errorf("the manifest says of %s: %+v (there: %v)", f.Name, f, ok)
		}
	}
	return m
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, text string, path ...string) {
	t.Helper()
	p := filepath.Join(path...)
	must(t, os.MkdirAll(filepath.Dir(p), 0o700), os.WriteFile(p, []byte(text), 0o600))
}

// Of secrets that are planted in every place of a hub that runs, none is in its bundle.
func TestHubsBundle(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	ss := secrets(t)
	t.Setenv("MY_SECRET_TOKEN", "planted-env-20")
	t.Setenv("https_proxy", "http://anna:planted-pw-21@127.0.0.1:1")
	dir := filepath.Join(t.TempDir(), "hub")
	_, err := hub.Init(dir, []string{"127.0.0.1:1"}, "127.0.0.1:0")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, hub.ConfigFile), []byte("# the password is planted-comment-22\nlisten = \"127.0.0.1:0\"\naddresses = [\"127.0.0.1:1\"]\nsites = [\"st-anna\"]\n"), 0o600))

	h, err := hub.Open(t.Context(), dir, slog.New(slog.DiscardHandler))
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- h.Run(ctx, func(net.Addr) { close(ready) }) }()
	defer func() { cancel(); must(t, <-done) }()
	<-ready

	// A job whose settings, events and logs have all of them, and a value that only its variables tell to be secret.
	db, err := sqlite.Open(t.Context(), filepath.Join(dir, hub.DatabaseFile))
	must(t, err)
	spec := job.Spec{Sites: []string{"st-anna"}}
	spec.Server.Env = map[string]string{"HARMLESS": "planted-by-value-30", "KEY": ss["a private key"].text}
	spec.Site.Env = map[string]string{"X": "yes"}
	j, err := db.CreateJob(t.Context(), job.Job{ID: job.NewID(time.Now()), Name: "app", Bundle: "sha256:00", Submitter: "maria", Spec: spec.WithDefaults(), Created: time.Now()}, []string{"st-anna"})
	must(t, err)
	for i, body := range []any{job.Text{Message: all(ss) + "planted-by-value-30"}, job.Program{Name: "x", Tail: strings.Split(all(ss), "\n")}, job.ClientFailure{Message: "x", Traceback: []string{"planted-by-value-30", ss["a flag"].text}}} {
		e, err := job.NewEvent(j.ID, job.HubParty, []string{job.KindNote, job.KindProgramEnded, job.KindClientFailure}[i], body, time.Now())
		must(t, err)
		_, _, err = db.Append(t.Context(), e, 0)
		must(t, err)
	}
	must(t, db.SetReason(t.Context(), j.ID, "waits for "+ss["a URL's password"].text), db.Close())
	jobDir := filepath.Join(dir, "jobs", string(j.ID))
	write(t, all(ss)+"planted-by-value-30\n", jobDir, "logs", "st-anna", "client_app_log.txt")
	write(t, strings.Repeat("x", maxTail)+"\n"+ss["a private key"].text+strings.Repeat("0123456789\n", maxTail/11-10), jobDir, "logs", "hub", "server_app_log.txt") // is cut within the key
	write(t, all(ss), jobDir, "party", "runner.log")
	log := filepath.Join(t.TempDir(), "hub.log")
	var lines strings.Builder
	for _, s := range ss {
		must(t, json.NewEncoder(&lines).Encode(map[string]any{"level": "INFO", "msg": s.text, "password": s.text, "nested": []any{map[string]any{"err": s.text}}}))
	}
	write(t, lines.String()+all(ss)+"planted-env-20 planted-by-value-30 \xff\xfe\n", log)

	b, err := Collect(t.Context(), Options{Kind: "hub", Dir: dir, Job: string(j.ID)[:20], Logs: []string{log}, Now: time.Now()})
	must(t, err)
	path := filepath.Join(t.TempDir(), "b.tar.gz")
	must(t, b.Write(path))
	files := unpack(t, path)
	keys, err := filepath.Glob(filepath.Join(dir, "*.key"))
	must(t, err)
	more := []string{"planted-by-value-30", "planted-env-20", "planted-pw-21", "planted-comment-22"}
	for _, k := range keys {
		text, err := os.ReadFile(k)
		must(t, err)
		more = append(more, strings.Split(string(text), "\n")[1])
	}
	clean(t, files, ss, more...)
	m := manifest(t, files)
	at := "job-" + string(j.ID) + "/"
	for name, says := range map[string]string{
		"config/hub.toml": "listen = '127.0.0.1:0'", "doctor.json": `"check": "store"`, "versions.json": `"pergola"`, "directory.txt": "ca.key", "process/status.json": `"st-anna"`,
		"process/metrics.txt": "pergola_store_up 1", "process/goroutines.txt": "goroutine", "process/readyz.json": `"store"`, "store.json": `"tables"`, "jobs.json": string(j.ID),
		"logs/given-1-hub.log": "a line before", at + "job.json": `"submitter"`, at + "events.jsonl": "program-ended", at + "logs/st-anna/client_app_log.txt": "a line after",
		at + "runner.log": "now comes JSON", at + "logs/hub/server_app_log.txt": "0123456789",
	} {
		if !strings.Contains(files[name], says) && !strings.Contains(files[name], strings.ReplaceAll(says, `"`, `\"`)) {
			t.Errorf("%s does not say %q: %.300s", name, says, files[name])
		}
	}
	for _, f := range m.Files {
		if strings.HasSuffix(f.Name, "server_app_log.txt") && !f.Cut {
			t.Errorf("that it was cut is not said: %+v", f)
		}
	}
	if err := b.Write(path); problem.CodeOf(err) != problem.Exists {
		t.Errorf("a second one at the same place: %v", err)
	}
	if _, err := Collect(t.Context(), Options{Kind: "hub", Dir: dir, Job: "zzzz", Now: time.Now()}); err == nil {
		t.Error("a job that is not there was found")
	}
	// A defect that leaves a secret is noticed, and nothing is written.
	b.Manifest.Files[0].data = []byte("planted-by-value-30")
	other := filepath.Join(t.TempDir(), "c.tar.gz")
	if err := b.Write(other); problem.CodeOf(err) != problem.Internal || strings.Contains(err.Error(), "planted") {
		t.Errorf("with a secret in it: %v", err)
	}
	if _, err := os.Stat(other); err == nil {
		t.Error("it was written all the same")
	}
}

// The same at a site whose agent does not run, and whose configuration has secrets wherever it can.
func TestSitesBundle(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	ss := secrets(t)
	dir := t.TempDir()
	auth, err := pki.NewAuthority("here")
	must(t, err)
	k, err := auth.NewKeypair(pki.Identity{Kind: pki.KindSite, Name: "st-anna"}, nil, time.Hour)
	must(t, err, pki.SaveKeypair(dir, "site", k))
	var env strings.Builder
	for _, s := range ss {
		fmt.Fprintf(&env, "V%d = %q\n", env.Len(), s.text)
	}
	write(t, fmt.Sprintf("name = \"st-anna\"\nhub = [\"127.0.0.1:1\"]\nproxy = \"http://anna:planted-pw-44@proxy.example.org:3128\"\n# %s\n[env]\nPLAIN = \"planted-value-40\"\nSHORT = \"7\"\nCITY = \"config\"\n%s", ss["an AWS key id"].text, env.String()), dir, site.ConfigFile)
	id := string(job.NewID(time.Now()))
	write(t, fmt.Sprintf(`{"job":%q,"party":"st-anna","proxy":"http://anna:planted-pw-41@p:1","spec":{"site":{"env":{"A":"planted-value-42"}}}}`, id), dir, "jobs", id, "party", "spec.json")
	write(t, all(ss)+"planted-value-40 planted-value-42 planted-pw-41\n", dir, "jobs", id, "party", "runner.log")
	write(t, string(k.KeyPEM), dir, "jobs", id, "party", "party.key")
	write(t, `{"seq":1,"event":{"kind":"note","body":{"message":"planted-value-40","token":"planted-token-43"}}}`+"\n", dir, "jobs", id, "party", "journal.jsonl")
	write(t, all(ss)+string(k.KeyPEM)+"planted-value-40\n", dir, "jobs", id, "logs", "supernode_log.txt")
	for i := range maxFiles + 5 {
		write(t, all(ss), dir, site.RunnerLogs, string(job.NewID(time.Now().Add(-time.Duration(i+1)*24*time.Hour)))+".log")
	}
	b, err := Collect(t.Context(), Options{Kind: "site", Dir: dir, Job: id[:16], Now: time.Now()})
	must(t, err)
	path := filepath.Join(t.TempDir(), "b.tar.gz")
	must(t, b.Write(path))
	files := unpack(t, path)
	clean(t, files, ss, "planted-value-40", "planted-pw-41", "planted-value-42", "planted-token-43", "planted-pw-44", strings.Split(string(k.KeyPEM), "\n")[1])
	m := manifest(t, files)
	if m.Name != "st-anna" || !slices.ContainsFunc(m.LeftOut, func(l LeftOut) bool {
		return l.What == "process/status.json" && strings.Contains(l.Why, "does not run")
	}) ||
		!slices.ContainsFunc(m.LeftOut, func(l LeftOut) bool { return strings.Contains(l.What, "5 more of") }) {
		t.Errorf("%+v", m.LeftOut)
	}
	if got := files[redact.Mark+"/site.toml"]; !strings.Contains(got, "SHORT = '[removed]'") || !strings.Contains(got, "proxy = 'http://[removed]@proxy.example.org:3128'") { // config is the value of a variable here
		t.Errorf("%v\n%s", slices.Collect(func(yield func(string) bool) {
			for n := range files {
				if !yield(n) {
					return
				}
			}
		}), got)
	}
	// A configuration that cannot be read may hold anything.
	write(t, "name = \"st-anna\"\nproxy = planted-broken-50\n", dir, site.ConfigFile)
	b, err = Collect(t.Context(), Options{Kind: "site", Dir: dir, Now: time.Now()})
	must(t, err)
	path = filepath.Join(t.TempDir(), "b.tar.gz")
	must(t, b.Write(path))
	files = unpack(t, path)
	clean(t, files, nil, "planted-broken-50")
	if _, ok := files["config/site.toml"]; ok {
		t.Error("it is in the bundle")
	}
}

// A store in Postgres is read too, and its password is not.
func TestPostgresBundle(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("PERGOLA_CACHE", t.TempDir())
	pg := pgtest.Start(t)
	dir := filepath.Join(t.TempDir(), "hub")
	_, err := hub.Init(dir, []string{"127.0.0.1:1"}, "127.0.0.1:0")
	must(t, err)
	url := pg.Fresh(t)
	url += map[bool]string{true: "&", false: "?"}[strings.Contains(url, "?")] + "password=planted-pw-60"
	write(t, fmt.Sprintf("listen = \"127.0.0.1:0\"\naddresses = [\"127.0.0.1:1\"]\nstore = %q\n", url), dir, hub.ConfigFile)
	h, err := hub.Open(t.Context(), dir, slog.New(slog.DiscardHandler))
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	must(t, h.Run(ctx, func(net.Addr) { cancel() }))
	b, err := Collect(t.Context(), Options{Kind: "hub", Dir: dir, Now: time.Now()})
	must(t, err)
	path := filepath.Join(t.TempDir(), "b.tar.gz")
	must(t, b.Write(path))
	files := unpack(t, path)
	clean(t, files, nil, "planted-pw-60")
	if !strings.Contains(files["store.json"], "PostgreSQL") || files["jobs.json"] == "" {
		t.Errorf("%v\n%s", manifest(t, files).LeftOut, files["store.json"])
	}
}
