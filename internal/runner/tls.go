package runner

import (
	"crypto/tls"
	"net"
	"time"
)

func tlsDialer(conf *tls.Config) *tls.Dialer {
	return &tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: conf}
}
