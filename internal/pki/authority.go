package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pergolafl/pergola/internal/problem"
)

const (
	// skew is how far a certificate's start lies back, so that a machine whose clock is late accepts it at once.
	skew = time.Hour
	// authorityLife is how long an authority may issue. No certificate outlives the authority that issued it.
	authorityLife = 10 * 365 * 24 * time.Hour
	// Organization is in the names of every authority and of all that they issue.
	Organization = "Pergola"
	// maxPEM bounds what is read as a certificate request or from a certificate file, in bytes.
	maxPEM = 64 << 10
)

// Authority is a private certificate authority: a self-signed certificate and its key.
type Authority struct {
	cert    *x509.Certificate
	certPEM []byte
	key     *ecdsa.PrivateKey
}

// NewAuthority makes an authority that may issue for ten years. The name is for people, not a [ValidName].
func NewAuthority(name string) (*Authority, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name, Organization: []string{Organization}},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true, // it issues identities, never another authority
	}, &x509.Certificate{Subject: pkix.Name{CommonName: name, Organization: []string{Organization}}}, key.Public(), key)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "no certificate authority could be made")
	}
	return newAuthority(der, key)
}

func newAuthority(der []byte, key *ecdsa.PrivateKey) (*Authority, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "the certificate authority cannot be read")
	}
	return &Authority{cert: cert, certPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key: key}, nil
}

// CertPEM gives the authority's certificate, which every party needs.
func (a *Authority) CertPEM() []byte { return append([]byte(nil), a.certPEM...) }

// NotAfter gives when the authority ends.
func (a *Authority) NotAfter() time.Time { return a.cert.NotAfter }

// Roots gives a pool with this authority alone.
func (a *Authority) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// Save writes ca.crt and ca.key into dir, both 0600; whoever reads ca.key can be anybody.
func (a *Authority) Save(dir string) error {
	keyPEM, err := EncodeKey(a.key)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "ca.key"), keyPEM); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "ca.crt"), a.certPEM)
}

// LoadAuthority reads what [Authority.Save] wrote.
func LoadAuthority(dir string) (*Authority, error) {
	certPEM, err := readFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	keyPEM, err := readFile(filepath.Join(dir, "ca.key"))
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, "restore both files from the same backup", "ca.crt and ca.key in %s do not make an authority", dir)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, problem.New(problem.Usage, "restore both files from the same backup", "ca.crt and ca.key in %s are not those of an authority", dir)
	}
	return newAuthority(pair.Certificate[0], key)
}

// Grant is what a certificate says beyond its identity.
type Grant struct {
	// TTL is for how long it is good from now on, though never longer than the authority.
	TTL time.Duration
	// Hosts, DNS names and IP addresses, are those under which a hub is dialled; its own name is always among them.
	Hosts []string
	// Enrolled is by which enrolment of its site or user it was issued; see [Enrolled]. Zero: by none.
	Enrolled time.Time
}

// Issue gives a certificate for pub as id.
func (a *Authority) Issue(pub crypto.PublicKey, id Identity, g Grant) ([]byte, error) {
	hosts, ttl := g.Hosts, g.TTL
	if err := id.Check(); err != nil {
		return nil, err
	}
	if ttl <= 0 {
		return nil, problem.New(problem.Usage, "ask for a longer time", "a certificate cannot be issued for %v", ttl)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id.Name, OrganizationalUnit: []string{string(id.Kind)}, Organization: []string{Organization}},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},

		BasicConstraintsValid: true,
	}
	t.URIs = append(t.URIs, id.url())
	if !g.Enrolled.IsZero() {
		t.Subject.SerialNumber = strconv.FormatInt(g.Enrolled.UnixNano(), 10)
	}
	if t.NotAfter.After(a.cert.NotAfter) {
		t.NotAfter = a.cert.NotAfter
	}
	if id.Kind == KindHub {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		t.DNSNames = []string{id.Name}
		for _, h := range hosts {
			if ip := net.ParseIP(h); ip != nil {
				t.IPAddresses = append(t.IPAddresses, ip)
			} else if h != id.Name {
				t.DNSNames = append(t.DNSNames, h)
			}
		}
	} else if len(hosts) > 0 {
		return nil, problem.New(problem.Usage, "leave the host names out", "%s cannot have host names: only a hub is dialled", id)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, pub, a.key)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "no certificate could be issued for %s", id)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// Sign issues a certificate for a request made by [NewRequest] if allow agrees to its identity. Only the public
// key and the identity are taken from the request. A request that cannot be read, is not signed by its own key or asks for
// anything but one identity is a denied problem; allow's error is given as it is.
func (a *Authority) Sign(csrPEM []byte, allow func(Identity) error, g Grant) ([]byte, error) {
	const next = "make the request again with this version of pergola"
	block, _ := pem.Decode(csrPEM)
	if len(csrPEM) > maxPEM || block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, problem.New(problem.Denied, next, "the certificate request is not one")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, problem.Wrap(err, problem.Denied, next, "the certificate request cannot be read")
	}
	if err := req.CheckSignature(); err != nil {
		return nil, problem.Wrap(err, problem.Denied, next, "the certificate request is not signed by its key")
	}
	if pub, ok := req.PublicKey.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		return nil, problem.New(problem.Denied, next, "the certificate request's key is not ECDSA P-256")
	}
	if len(req.URIs) != 1 || len(req.DNSNames)+len(req.IPAddresses)+len(req.EmailAddresses) != 0 {
		return nil, problem.New(problem.Denied, next, "the certificate request does not ask for exactly one identity")
	}
	id, err := ParseIdentity(req.URIs[0].String())
	if err != nil {
		return nil, err
	}
	if err := allow(id); err != nil {
		return nil, err
	}
	return a.Issue(req.PublicKey, id, g)
}

// NewKeypair makes a key and issues its certificate, for programs that hold the authority themselves. It is of no enrolment.
func (a *Authority) NewKeypair(id Identity, hosts []string, ttl time.Duration) (Keypair, error) {
	return a.Keypair(id, Grant{TTL: ttl, Hosts: hosts})
}

// Keypair is NewKeypair with all that can be said in a certificate.
func (a *Authority) Keypair(id Identity, g Grant) (Keypair, error) {
	key, err := NewKey()
	if err != nil {
		return Keypair{}, err
	}
	cert, err := a.Issue(key.Public(), id, g)
	if err != nil {
		return Keypair{}, err
	}
	keyPEM, err := EncodeKey(key)
	if err != nil {
		return Keypair{}, err
	}
	return Keypair{CertPEM: cert, KeyPEM: keyPEM, CAPEM: a.CertPEM()}, nil
}

// Keypair is a certificate, its key, and the certificate of the authority to trust.
type Keypair struct {
	CertPEM, KeyPEM, CAPEM []byte
}

// Certificate gives the pair as crypto/tls wants it.
func (k Keypair) Certificate() (tls.Certificate, error) {
	c, err := tls.X509KeyPair(k.CertPEM, k.KeyPEM)
	if err != nil {
		return tls.Certificate{}, problem.Wrap(err, problem.Usage, "have the certificate issued again", "the certificate and its key do not fit")
	}
	return c, nil
}

// Roots gives the pool of the authority to trust.
func (k Keypair) Roots() (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(k.CAPEM) {
		return nil, problem.New(problem.Usage, "have the certificate issued again", "the authority's certificate cannot be read")
	}
	return pool, nil
}

// Identity gives whom the certificate speaks for; its validity and signature are not looked at.
func (k Keypair) Identity() (Identity, error) {
	c, err := k.Certificate()
	if err != nil {
		return Identity{}, err
	}
	return CertIdentity(c.Leaf)
}

// NewKey makes an ECDSA P-256 key.
func NewKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "no key could be made")
	}
	return key, nil
}

// EncodeKey gives the key as PKCS #8 PEM.
func EncodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "the key cannot be written")
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// NewRequest gives a certificate request, PEM, that asks for id and proves that the key is held.
func NewRequest(key *ecdsa.PrivateKey, id Identity) ([]byte, error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	t := &x509.CertificateRequest{Subject: pkix.Name{CommonName: id.Name}}
	t.URIs = append(t.URIs, id.url())
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "no certificate request could be made for %s", id)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}
