// Package client knows the hubs that a user may call: each is a context, a folder with the hub's addresses and the user's key pair.
//
//	$XDG_CONFIG_HOME/pergola/contexts/NAME/context.toml   hub's addresses, proxy
//	                                      user.crt, user.key, ca.crt
//	$XDG_CONFIG_HOME/pergola/context                      the name of the one in use
//
// It makes no identities; it has those that it knows renewed. Start with [Open].
package client

import (
	"context"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pergolafl/pergola/internal/api"
	pb "github.com/pergolafl/pergola/internal/api/pergola/v1"
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

	cred *pki.Credential // of Open
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
	cred, err := pki.OpenCredential(c.Dir, pair)
	if err != nil {
		return nil, c, err
	}
	conf, err := cred.ClientTLS(pki.HubName)
	if err != nil {
		return nil, c, err
	}
	c.cred = cred
	cl, err := api.Dial(uplink.Config{Hubs: c.Hubs, Proxy: c.Proxy, TLS: conf})
	return cl, c, err
}

// renewWait is how long a hub may take to renew a certificate.
const renewWait = 5 * time.Second

// Renew has the user's certificate renewed if that is due; cl is the client that [Open] gave with c. A certificate that is over
// cannot be renewed, which calls say by themselves.
func (c Context) Renew(ctx context.Context, cl *api.Client) error {
	leaf := c.cred.Certificate().Leaf
	if now := time.Now(); now.Before(pki.Due(leaf)) || now.After(leaf.NotAfter) {
		return nil
	}
	id, err := pki.CertIdentity(leaf)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, renewWait)
	defer cancel()
	k, err := pki.NewSigned(id, c.cred.Pair().CAPEM, func(csr string) (string, string, error) {
		res, err := cl.Who.Renew(ctx, &pb.RenewRequest{CsrPem: csr})
		return res.GetCertificatePem(), "", err
	})
	if err != nil {
		return err
	}
	return c.cred.Replace(k)
}

// Ends gives until when the user's certificate is good.
func (c Context) Ends() time.Time { return c.cred.Certificate().Leaf.NotAfter }

// Again tells whether a token of the hub with that authority lets a context's own user in again: then it gets a new certificate, and
// stays as it is otherwise.
func (c Context) Again(user string, authority [sha256.Size]byte) bool {
	k, err := pki.LoadKeypair(c.Dir, pair)
	if err != nil {
		return false
	}
	id, err := k.Identity()
	block, _ := pem.Decode(k.CAPEM)
	return err == nil && id == pki.Identity{Kind: pki.KindUser, Name: user} && block != nil && sha256.Sum256(block.Bytes) == authority
}

// Rejoin gives a context a new key pair.
func (c Context) Rejoin(k pki.Keypair) error { return pki.SaveKeypair(c.Dir, pair, k) }
