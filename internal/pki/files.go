package pki

import (
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"syscall"

	"github.com/pergolafl/pergola/internal/problem"
)

// newSerial gives 127 random bits: RFC 5280 wants a positive number of at most 20 octets.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, problem.Wrap(err, problem.Internal, "", "no serial number could be made")
	}
	return n.Add(n, big.NewInt(1)), nil
}

// writeFile replaces path by data in one step, readable by the owner alone.
func writeFile(path string, data []byte) (err error) {
	defer func() {
		switch {
		case err == nil:
		case errors.Is(err, syscall.ENOSPC):
			err = problem.Wrap(err, problem.DiskFull, "make room there", "%s cannot be written", path)
		default:
			err = problem.Wrap(err, problem.Usage, "see that the folder exists and may be written", "%s cannot be written", path)
		}
	}()
	tmp, err := os.CreateTemp(filepath.Dir(path), ".pki-*") // made 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in a folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readFile reads a PEM file of at most maxPEM bytes.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		code := problem.Usage
		if errors.Is(err, fs.ErrNotExist) {
			code = problem.NotFound
		}
		return nil, problem.Wrap(err, code, "have the certificate issued again, or name the right folder", "%s cannot be read", path)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, "see that the file may be read", "%s cannot be read", path)
	}
	if len(b) > maxPEM {
		return nil, problem.New(problem.Usage, "name the right folder", "%s is too large for a certificate or key", path)
	}
	return b, nil
}
