// Package client knows the hubs that a user may call: each is a context, a folder with the hub's addresses and the user's key pair.
//
//	$XDG_CONFIG_HOME/pergola/contexts/NAME/context.toml   hub's addresses, proxy
//	                                      user.crt, user.key, ca.crt
//	$XDG_CONFIG_HOME/pergola/context                      the name of the one in use
//
// It neither makes identities nor renews them. Start with [Open].
package client

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pergolafl/pergola/internal/api"
	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/uplink"
)

// Environment is the variable that names a context where no flag does.
const Environment = "PERGOLA_CONTEXT"

// File is the name of a context's configuration in its folder.
const File = "context.toml"

// pair begins the names of a context's key pair.
const pair = "user"

// Context is one hub, as one user knows it.
type Context struct {
	Name  string   `toml:"-"`
	Dir   string   `toml:"-"`
	Hubs  []string `toml:"hubs"`  // "host:port", tried in turn
	Proxy string   `toml:"proxy"` // as package uplink takes it; "" = as the environment says
	User  string   `toml:"user"`  // whom the certificate speaks for
}

// Folder gives where the contexts of this user are.
func Folder() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", problem.Wrap(err, problem.Usage, "set HOME or XDG_CONFIG_HOME", "nobody knows where this user's configuration is")
	}
	return filepath.Join(dir, "pergola"), nil
}

// Names gives the contexts there are, sorted.
func Names() ([]string, error) {
	dir, err := Folder()
	if err != nil {
		return nil, err
	}
	es, err := os.ReadDir(filepath.Join(dir, "contexts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, problem.Wrap(err, problem.Usage, "see that the folder may be read", "the contexts cannot be listed")
	}
	var out []string
	for _, e := range es {
		if e.IsDir() && pki.ValidName(e.Name()) == nil {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// Current gives the name of the context in use: of the environment, of the file, or of the only one there is; "" for none.
func Current() (string, error) {
	if n := os.Getenv(Environment); n != "" {
		return n, nil
	}
	dir, err := Folder()
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(filepath.Join(dir, "context"))
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", problem.Wrap(err, problem.Usage, "see that the file may be read", "the context in use is not known")
	}
	names, err := Names()
	if err != nil || len(names) != 1 {
		return "", err
	}
	return names[0], nil
}

// Use makes a context the one in use.
func Use(name string) error {
	if _, err := Load(name); err != nil {
		return err
	}
	dir, err := Folder()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "context"), []byte(name+"\n"), 0o600); err != nil {
		return problem.Wrap(err, problem.Usage, "see that the folder may be written", "the context in use cannot be changed")
	}
	return nil
}

// Save makes a context, or replaces the one of that name. The first one there is becomes the one in use.
func Save(c Context, k pki.Keypair) error {
	if err := pki.ValidName(c.Name); err != nil {
		return err
	}
	dir, err := Folder()
	if err != nil {
		return err
	}
	c.Dir = filepath.Join(dir, "contexts", c.Name)
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return problem.Wrap(err, problem.Usage, "see that the folder may be written", "the context %s cannot be made", c.Name)
	}
	if err := pki.SaveKeypair(c.Dir, pair, k); err != nil {
		return err
	}
	if err := config.Write(filepath.Join(c.Dir, File), c); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "context")); errors.Is(err, fs.ErrNotExist) {
		return Use(c.Name)
	}
	return nil
}

// Load reads a context; name "" is the one in use.
func Load(name string) (Context, error) {
	if name == "" {
		var err error
		if name, err = Current(); err != nil {
			return Context{}, err
		}
		if name == "" {
			return Context{}, problem.New(problem.Usage, "name one with --context, or log in with a token of the hub's operator: pergola login TOKEN", "no hub is known, or none is chosen")
		}
	}
	dir, err := Folder()
	if err != nil {
		return Context{}, err
	}
	names, err := Names()
	if err != nil {
		return Context{}, err
	}
	if !slices.Contains(names, name) {
		return Context{}, problem.New(problem.Usage, "see them with: pergola context ls", "no context is named %q%s", name, problem.DidYouMean(name, names))
	}
	c := Context{Name: name, Dir: filepath.Join(dir, "contexts", name)}
	path := filepath.Join(c.Dir, File)
	if err := config.Read(path, &c); err != nil {
		return Context{}, err
	}
	if len(c.Hubs) == 0 {
		return Context{}, problem.New(problem.Usage, `write hubs = ["HOST:PORT"]`, "%s names no hub", path)
	}
	return c, nil
}

// Open gives a client of a context's hub; name "" is the context in use. Nothing is dialled yet.
func Open(name string) (*api.Client, Context, error) {
	c, err := Load(name)
	if err != nil {
		return nil, c, err
	}
	k, err := pki.LoadKeypair(c.Dir, pair)
	if err != nil {
		return nil, c, err
	}
	cert, err := k.Certificate()
	if err != nil {
		return nil, c, err
	}
	roots, err := k.Roots()
	if err != nil {
		return nil, c, err
	}
	cl, err := api.Dial(uplink.Config{Hubs: c.Hubs, Proxy: c.Proxy, TLS: pki.ClientTLS(cert, roots, pki.HubName)})
	return cl, c, err
}
