package sock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLost is that not all files came that were sent: more than there may be, or none can be opened any more.
var ErrLost = errors.New("files were lost on their way")

// ReadFiles reads bytes of a unix socket, and the files that come with them, most at a time. They are the caller's, also on an error.
func ReadFiles(c *net.UnixConn, b []byte, most int) (n int, files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(most*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if oobn > 0 {
		var ferr error
		files, ferr = parseFiles(oob[:oobn])
		if err == nil {
			err = ferr
		}
	}
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = ErrLost
	}
	if err == nil && n == 0 && len(b) > 0 {
		err = io.EOF
	}
	return n, files, err
}

func parseFiles(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("read the descriptors of a message: %w", err)
	}
	var out []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return out, fmt.Errorf("read the descriptors of a message: %w", err)
		}
		for _, fd := range fds {
			out = append(out, os.NewFile(uintptr(fd), "received"))
		}
	}
	return out, nil
}
