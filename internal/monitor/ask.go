package monitor

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/pergolafl/pergola/internal/sock"
)

// maxPage bounds an answer, in bytes.
const maxPage = 16 << 20

// Ask gets a page, such as "/status", from the process that serves the socket at path. The status is HTTP's. The error is one of the connection:
// nobody serves it, or not in time.
func Ask(ctx context.Context, path, page string) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return sock.Dial(ctx, path) }, DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://monitor"+page, nil)
	if err != nil {
		return 0, nil, err
	}
	res, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	body, err = io.ReadAll(io.LimitReader(res.Body, maxPage+1))
	if err == nil && len(body) > maxPage {
		err = fmt.Errorf("the page %s is longer than %d bytes", page, maxPage)
	}
	return res.StatusCode, body, err
}
