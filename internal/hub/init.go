package hub

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/pergolafl/pergola/internal/config"
	"github.com/pergolafl/pergola/internal/enrol"
	"github.com/pergolafl/pergola/internal/pki"
	"github.com/pergolafl/pergola/internal/problem"
	"github.com/pergolafl/pergola/internal/store"
	"github.com/pergolafl/pergola/internal/uplink"
)

// Init makes the directory of a new hub: its authority, its key pair and hub.toml. Addresses are those at which sites and users reach it,
// "host:port"; listen is where it listens, "" for the port of the first address on all of the machine's addresses.
func Init(dir string, addresses []string, listen string) (*pki.Authority, error) {
	const next = `write it like --address hub.example.org:8443`
	if len(addresses) == 0 {
		return nil, problem.New(problem.Usage, next, "the hub needs an address at which sites and users reach it")
	}
	var hosts []string
	for _, a := range addresses {
		host, port, err := net.SplitHostPort(a)
		if err != nil || host == "" || port == "" || port == "0" {
			return nil, problem.New(problem.Usage, next, "%q is not the HOST:PORT at which a hub can be reached", a)
		}
		if _, err := uplink.ParseAddress(a); err != nil {
			return nil, err
		}
		hosts = append(hosts, host)
		if listen == "" {
			listen = ":" + port
		}
	}
	for _, f := range []string{ConfigFile, "ca.key"} {
		if _, err := os.Stat(filepath.Join(dir, f)); !errors.Is(err, fs.ErrNotExist) {
			return nil, problem.New(problem.Usage, "choose another directory with --dir; the hub that is there is started with: pergola hub --dir "+dir, "%s has a hub already (%s)", dir, f)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, problem.Wrap(err, problem.Usage, "choose another with --dir", "the hub's directory cannot be made")
	}
	auth, err := pki.NewAuthority("Pergola hub " + hosts[0])
	if err != nil {
		return nil, err
	}
	pair, err := auth.NewKeypair(pki.Identity{Kind: pki.KindHub, Name: pki.HubName}, hosts, DefaultCertTTL)
	if err != nil {
		return nil, err
	}
	// hub.toml last: without it there is no hub, and this can be done again.
	if err := errors.Join(pki.SaveKeypair(dir, "hub", pair), auth.Save(dir)); err != nil {
		return nil, err
	}
	return auth, config.Write(filepath.Join(dir, ConfigFile), struct {
		Listen    string   `toml:"listen"`
		Addresses []string `toml:"addresses"`
	}{listen, addresses})
}

// NewToken makes a token by which a site or user can enrol once at the hub in dir, which may run or not, within ttl. By is who makes it.
func NewToken(ctx context.Context, dir string, kind pki.Kind, name string, ttl time.Duration, by string) (t enrol.Token, err error) {
	if err := (pki.Identity{Kind: kind, Name: name}).Check(); err != nil {
		return t, err
	}
	if ttl <= 0 {
		return t, problem.New(problem.Usage, "write it like --ttl 24h", "a token cannot be good for %s", ttl)
	}
	var conf Config
	if err := config.Read(filepath.Join(dir, ConfigFile), &conf); err != nil {
		return t, err
	}
	if err := conf.check(); err != nil {
		return t, err
	}
	if len(conf.Addresses) == 0 {
		return t, problem.New(problem.Usage, `write addresses = ["HOST:PORT"]`, "%s does not say at which address the hub is reached", filepath.Join(dir, ConfigFile))
	}
	auth, err := pki.LoadAuthority(dir)
	if err != nil {
		return t, err
	}
	db, err := openStore(ctx, dir, conf.Store)
	if err != nil {
		return t, err
	}
	defer func() {
		if e := db.Close(); err == nil {
			err = e
		}
	}()
	now := time.Now()
	t = enrol.Token{Kind: kind, Name: name, Hubs: conf.Addresses, CA: auth.Fingerprint(), Secret: enrol.NewSecret(), Expires: now.Add(ttl).Truncate(time.Second)}
	return t, db.PutToken(ctx, store.Token{Hash: enrol.Hash(t.Secret), Kind: string(kind), Name: name, Created: now, Expires: t.Expires, By: by})
}
