package flower

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pergolafl/pergola/internal/problem"
)

// fakeVar makes the test binary a stand-in for a superlink of the newest generation, with the fault that it names: for what
// real superlinks cannot be made to do.
const fakeVar = "PERGOLA_FAKE_SUPERLINK"

// fakeRun is the id of the stand-in's one run.
const fakeRun = 42

// fakeSuperlink serves the Control API until it is killed.
func fakeSuperlink(fault string, args []string) {
	value := func(flag string) string {
		if i := slices.Index(args, flag); i >= 0 && i+1 < len(args) {
			return args[i+1]
		}
		return ""
	}
	entry := func(run uint64, status, sub string) []byte {
		return message(1, varint(1, run), message(2, varint(1, run), message(10, message(1, []byte(status)), message(2, []byte(sub)))))
	}
	running, other := entry(fakeRun, "running", ""), entry(7, "finished", "failed")
	var mu sync.Mutex
	asked, stopped := 0, false
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/control/start-run", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(varint(1, fakeRun)) })
	mux.HandleFunc("/v1/control/stop-run", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if fault == "refuses to stop" || err != nil || !bytes.Equal(b, varint(1, fakeRun)) {
			http.Error(w, "not this one", http.StatusConflict)
			return
		}
		mu.Lock()
		stopped = true
		mu.Unlock()
		_, _ = w.Write(varint(1, 1))
	})
	mux.HandleFunc("/v1/control/list-runs", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		b, err := io.ReadAll(r.Body)
		switch {
		case err != nil || !bytes.Equal(b, varint(1, fakeRun)):
			_, _ = w.Write(other) // not asked by the run's own id
		case stopped:
			_, _ = w.Write(entry(fakeRun, "finished", "stopped"))
		case fault != "odd answers":
			_, _ = w.Write(running)
		default:
			switch asked {
			case 1:
				http.Error(w, "sorry", http.StatusInternalServerError)
			case 2:
				_, _ = w.Write([]byte("no protobuf \xff\xff"))
			case 3: // no run at all
			case 4:
				_, _ = w.Write(other)
			case 5:
				_, _ = w.Write(slices.Concat(other, running))
			case 6:
				panic(http.ErrAbortHandler) // the connection breaks
			case 7:
				_, _ = w.Write(entry(fakeRun, "odd", "state"))
			default:
				_, _ = w.Write(slices.Concat(other, entry(fakeRun, "finished", "completed")))
			}
		}
	})
	server := http.Server{Addr: net.JoinHostPort(value("--host"), value("--port")), Handler: mux, ReadHeaderTimeout: time.Minute}
	fmt.Println(server.ListenAndServe())
}

// beginFake starts a server whose superlink is the stand-in.
func beginFake(t *testing.T, fault string, cfg ServerConfig) *run {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\n%s='%s' exec '%s' \"$@\"\n", fakeVar, fault, self)
	if err := os.WriteFile(filepath.Join(dir, ProgramSuperlink), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	r := &run{t: t, dir: dir}
	cfg.Install = &Installation{Version: "1.41.0", Bin: dir, Known: true, Caps: Caps{Generation: GenHTTP}}
	cfg.AppDir, cfg.RunDir, cfg.LogDir, cfg.FlwrHome, cfg.IP, cfg.Env, cfg.OnEvent = write(t, appFiles(goodApp)), dir, dir, filepath.Join(dir, "flwr"), testIP(), os.Environ(), r.on
	if r.server, err = StartServer(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.server.Stop(0) })
	return r
}

// exits gives the codes with which programs ended, in order.
func (r *run) exits() (out []string) {
	for _, e := range r.all(ProgramEnded) {
		out = append(out, fmt.Sprintf("%s %d", e.Program, e.Exit.Code))
	}
	return out
}

// Reference row 19: one failed or odd answer ended the job there, and the first run of the list was taken for the job's.
func TestOddAnswersAreNoEnd(t *testing.T) {
	r := beginFake(t, "odd answers", ServerConfig{})
	if err := r.server.RunApp(t.Context()); err != nil {
		t.Error(err)
	}
	if got := r.exits(); !slices.Equal(got, []string{ProgramServerApp + " 0"}) {
		t.Errorf("ended: %q", got)
	}
}

// However a superlink takes the wish to stop a run, its programs are ended.
func TestStopByWayOfFlower(t *testing.T) {
	for _, c := range []struct {
		name, fault string
		freeze      bool
		grace       time.Duration
		note        string // "" = none
		code        int    // of the server app
	}{
		{name: "it does so", grace: time.Minute, note: "run 42 is finished:stopped", code: -15},
		{name: "it refuses", fault: "refuses to stop", grace: time.Millisecond * 200, note: "run 42 cannot be stopped by way of Flower: not this one", code: 102},
		{name: "it hangs", freeze: true, grace: time.Millisecond * 200, note: "the superlink did not stop run 42 within 200ms: ", code: 102},
		{name: "nobody asks it", grace: -1, code: 102},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.fault == "" {
				c.fault = "none"
			}
			r := beginFake(t, c.fault, ServerConfig{StopGrace: c.grace})
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			why := errors.New("aborted")
			r.mu.Lock()
			r.onEach = func(e Event) {
				if e.Kind != ProgramStarted || e.Program != ProgramServerApp {
					return
				}
				if c.freeze {
					if err := syscall.Kill(r.server.link.Pid(), syscall.SIGSTOP); err != nil {
						t.Error(err)
					}
					// Until all of its threads stand still.
					if err := unix.Waitid(unix.P_PID, r.server.link.Pid(), nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
						t.Error(err)
					}
				}
				cancel(why)
			}
			r.mu.Unlock()
			if err := r.server.RunApp(ctx); !errors.Is(err, why) {
				t.Error(err)
			}
			r.server.Stop(time.Minute) // SIGTERM goes through to one that stands still
			if want := []string{fmt.Sprintf("%s %d", ProgramServerApp, c.code), ProgramSuperlink + " -15"}; !slices.Equal(r.exits(), want) {
				t.Errorf("ended: %q, want %q", r.exits(), want)
			}
			notes := r.all(Note)
			if c.note == "" && len(notes) > 0 || c.note != "" && (len(notes) != 1 || !strings.HasPrefix(notes[0].Message, c.note)) {
				t.Errorf("notes %+v, want %q", notes, c.note)
			}
		})
	}
}

// A server app that cannot start has the reference's code, and its superlink does not stay.
func TestServerAppThatCannotStart(t *testing.T) {
	r := beginFake(t, "none", ServerConfig{Args: []string{"--format", "json"}}) // by `flwr run`, which is not there
	err := r.server.RunApp(t.Context())
	if e := problem.From(err); e == nil || e.Code != problem.ProgramFailed || e.Log != ServerAppLog || !strings.Contains(e.Msg, "flwr run could not start") {
		t.Errorf("%+v", err)
	}
	r.server.Stop(time.Minute)
	if want := []string{ProgramFlwrRun + " 101", ProgramSuperlink + " -15"}; !slices.Equal(r.exits(), want) {
		t.Errorf("ended: %q, want %q", r.exits(), want)
	}
}
