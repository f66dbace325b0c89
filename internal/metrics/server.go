package metrics

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	human "github.com/dustin/go-humanize"
)

// Names of the variables by which programs find their party's server.
const (
	MLflowVar = "MLFLOW_TRACKING_URI"
	PlainVar  = "PERGOLA_METRICS"
	SiteVar   = "PERGOLA_SITE" // the party's name
)

const (
	// DefaultMaxBytes is how much of a party's metrics is kept: some two million records.
	DefaultMaxBytes = 256 << 20

	// maxBody is the most bytes of one request. MLflow's clients send 1 MB at most (MAX_BATCH_LOG_REQUEST_SIZE).
	maxBody = 4 << 20

	// maxBatch is the most records of one request; MLflow's clients send 1000 at most (MAX_ENTITIES_PER_BATCH).
	maxBatch = 10_000
)

// Options say where a server listens and writes. OnRecords and OnError may be nil; they are called by several goroutines.
type Options struct {
	IP        string // a loopback address of this party's own
	Dir       string // the party's log folder, which exists when the first record comes
	Site      string // the party's name
	MaxBytes  int64  // of the metrics file; 0 = DefaultMaxBytes
	Log       *slog.Logger
	OnRecords func()      // records were written: the party's work moves
	OnError   func(error) // the file cannot be written; its client is told, too
}

// Server takes one party's metrics.
type Server struct {
	opt    Options
	base   string // http://IP:PORT/TOKEN
	file   *file
	http   *http.Server
	served chan struct{} // closed when nothing is served any more
	ml     *mlflow

	warned sync.Once
}

// Serve listens on a port of opt.IP until Close. The addresses hold a token, by which other users of the machine, who reach
// its loopback addresses too, are kept out.
func Serve(ctx context.Context, opt Options) (*Server, error) {
	if ip := net.ParseIP(opt.IP); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("metrics are taken on a loopback address only, not on %q", opt.IP)
	}
	if opt.MaxBytes == 0 {
		opt.MaxBytes = DefaultMaxBytes
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	token := make([]byte, 16)
	if _, err := rand.Read(token); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", net.JoinHostPort(opt.IP, "0"))
	if err != nil {
		return nil, err
	}
	s := &Server{opt: opt, file: newFile(opt.Dir, opt.MaxBytes), served: make(chan struct{})}
	s.ml = newMLflow(s.keep)
	path := hex.EncodeToString(token)
	s.base = "http://" + ln.Addr().String() + "/" + path
	s.http = &http.Server{
		Handler: s.handler(path), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10,
		ErrorLog: slog.NewLogLogger(opt.Log.Handler(), slog.LevelDebug),
	}
	go func() {
		defer close(s.served)
		if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			opt.Log.Error("metrics are not taken any more", "err", err)
		}
	}()
	return s, nil
}

// Env gives the variables for the party's programs. given is their environment so far: a tracking server that the job or
// the site has chosen stays theirs. MLflow's own telemetry and its lines about a web page, which is not there, are off
// unless asked for.
func (s *Server) Env(given []string) []string {
	set := map[string]bool{}
	for _, kv := range given {
		k, _, _ := strings.Cut(kv, "=")
		set[k] = true
	}
	env := []string{PlainVar + "=" + s.base + "/metrics", SiteVar + "=" + s.opt.Site}
	if !set[MLflowVar] {
		env = append(env, MLflowVar+"="+s.base)
		if !set["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] {
			env = append(env, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT=true")
		}
	}
	if !set["MLFLOW_DISABLE_TELEMETRY"] {
		env = append(env, "MLFLOW_DISABLE_TELEMETRY=true")
	}
	return env
}

// Close answers what was asked, ends the server and has everything on disk. Programs that log are to be gone by then.
func (s *Server) Close() error {
	bye, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := s.http.Shutdown(bye)
	if err != nil {
		err = s.http.Close()
	}
	<-s.served
	return errors.Join(err, s.file.close())
}

// handler takes off the token. A request without it learns nothing.
func (s *Server) handler(token string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/metrics", s.plain)
	s.ml.register(mux)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first, rest, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		if !ok || subtle.ConstantTimeCompare([]byte(first), []byte(token)) != 1 {
			http.Error(w, "not found", http.StatusNotFound)
			return
		}
		r2 := r.Clone(r.Context())
		r2.URL.Path, r2.URL.RawPath = "/"+rest, ""
		r2.Body = http.MaxBytesReader(w, r.Body, maxBody)
		mux.ServeHTTP(w, r2)
	})
}

// keep writes records to the file, under the party's name.
func (s *Server) keep(recs []Record) *failure {
	if len(recs) == 0 {
		return nil
	}
	for i := range recs {
		recs[i].Site = s.opt.Site
		if recs[i].Time.IsZero() {
			recs[i].Time = time.Now()
		}
		if err := recs[i].check(); err != nil {
			return badInput("%v", err)
		}
	}
	switch err := s.file.add(recs); {
	case errors.Is(err, errFull):
		s.warned.Do(func() {
			s.opt.Log.Warn("the party has logged as many metrics as are kept", "bytes", s.opt.MaxBytes)
		})
		return &failure{http.StatusInsufficientStorage, codeLimit, fmt.Sprintf("%s has logged %s of metrics in this job, and no more are kept: log less often",
			s.opt.Site, human.IBytes(uint64(s.opt.MaxBytes)))}
	case err != nil:
		s.opt.Log.Error("metrics cannot be written", "err", err)
		if s.opt.OnError != nil {
			s.opt.OnError(err)
		}
		return &failure{http.StatusInsufficientStorage, codeInternal, "the metrics cannot be written to disk at " + s.opt.Site}
	}
	if s.opt.OnRecords != nil {
		s.opt.OnRecords()
	}
	return nil
}

// failure is an answer that is not what the client wanted. No status is one that MLflow's clients repeat by themselves
// (429, 500, 502, 503, 504): nothing here gets better by waiting.
type failure struct {
	status  int
	code    string // of mlflow/protos/databricks.proto, ErrorCode
	message string
}

const (
	codeInvalid   = "INVALID_PARAMETER_VALUE"
	codeMissing   = "RESOURCE_DOES_NOT_EXIST"
	codeExists    = "RESOURCE_ALREADY_EXISTS"
	codeLimit     = "RESOURCE_LIMIT_EXCEEDED"
	codeEndpoint  = "ENDPOINT_NOT_FOUND"
	codeNotThere  = "NOT_IMPLEMENTED"
	codeInternal  = "INTERNAL_ERROR"
	codeMalformed = "MALFORMED_REQUEST"
)

func badInput(format string, args ...any) *failure {
	return &failure{http.StatusBadRequest, codeInvalid, fmt.Sprintf(format, args...)}
}

// write sends MLflow's form of an error, from which its clients make their exception.
func (f *failure) write(w http.ResponseWriter) {
	answer(w, f.status, struct {
		Code    string `json:"error_code"`
		Message string `json:"message"`
	}{f.code, f.message})
}

func answer(w http.ResponseWriter, status int, body any) {
	b, err := json.Marshal(body)
	if err != nil { // only for what cannot be JSON, and all of it is made here
		status, b = http.StatusInternalServerError, []byte(`{"error_code":"`+codeInternal+`","message":"the answer is no JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a client that is gone does not want it
}

// readBody reads a request, or says why it cannot be read.
func readBody(r *http.Request) ([]byte, *failure) {
	b, err := io.ReadAll(r.Body)
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, &failure{http.StatusRequestEntityTooLarge, codeInvalid, fmt.Sprintf("a request may have %s at most: send several", human.IBytes(maxBody))}
	}
	if err != nil {
		return nil, &failure{http.StatusBadRequest, codeMalformed, "the request broke off: " + err.Error()}
	}
	return b, nil
}
